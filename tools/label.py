"""CheXpert labels of a CSV file of reports, in the CSV format of the CheXpert labeler.

  python -m tools.label reports.csv -o labels.csv [--evidence]

One report a row, after an optional header like `Reports`. --evidence prints the phrase and the cue
behind each label.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from data import LABELS
from rewards import extract_labels, find_mentions
from runtime.config import InputError, reason_of
from runtime.output import write_atomically
from runtime.processes import argument_parser, run_main

# By state: BLANK, POSITIVE, NEGATIVE, UNCERTAIN.
VALUES = ("", "1.0", "0.0", "-1.0")
NAMES = ("blank", "positive", "negative", "uncertain")
HEADERS = ("reports", "report", "report impression")


def label_file(path: str, output: str) -> list[str]:
    """Write the labels of the reports in `path` to `output`, and return the reports."""
    reports = read_reports(path)
    write_atomically(Path(output), labels_csv(reports))
    return reports


def read_reports(path):
    """The reports in a CSV file, one a row. A header is optional. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read ({reason_of(error)})") from None
    if rows and rows[0] and rows[0][0].strip().lower() in HEADERS:
        del rows[0]

    for number, row in enumerate(rows, 1):
        if len(row) > 1:
            raise InputError(
                f"{path}: report {number} has {len(row)} cells; quote a report that has commas"
            )
    return ["".join(row) for row in rows]


def labels_csv(reports):
    """One row per report: the text, then 1.0, 0.0, -1.0 or nothing for each of LABELS."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["Reports", *LABELS])
    for report, states in zip(reports, extract_labels(reports).tolist()):
        writer.writerow([report, *(VALUES[state] for state in states)])
    return file.getvalue()


def evidence(reports: list[str]) -> Iterator[str]:
    """A line for every mention: report, label, state, the phrase and its cue, the clause."""
    for number, report in enumerate(reports, 1):
        for label, state, phrase, cue, clause in find_mentions(report):
            because = f" <- {cue}" if cue else ""
            found = f"{LABELS[label]} | {NAMES[state]} | {phrase}{because}"
            yield f"{number} | {found} | {clause.strip()}"


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("reports")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--evidence", action="store_true")
    args = parser.parse_args()
    reports = label_file(args.reports, args.output)
    if args.evidence:
        for line in evidence(reports):
            print(line)
    print(f"{args.output}: labels of {len(reports)} reports")


if __name__ == "__main__":
    run_main(main)
