"""Write phantoms as IU X-Ray lies on disk (R2Gen's layout), to try its recipe without its data.

  python -m tools.write_phantoms data/phantoms_as_iu_xray [--train 2000] [--val 300] [--test 600]

FOLDER gets annotation.json, with reports and splits, and images/ID/0.png.
"""

import json
from itertools import islice
from pathlib import Path

from data import QUESTIONS
from readers import phantom
from runtime.config import InputError
from runtime.output import progress, write_atomically
from runtime.processes import argument_parser, run_main


def write_phantoms(folder: Path, sizes: dict[str, int]):
    """Write studies of each split with a report. Raises InputError."""
    path = folder / "annotation.json"
    if path.exists():
        raise InputError(f"{path} is there already: name another folder, or delete this one")
    annotation = {}
    for split, size in sizes.items():
        # Of the two sets, the first has the reports.
        studies = islice(phantom.read(0, split, size, QUESTIONS), size)
        rows = []
        for study in progress(studies, split, total=size):
            (report,) = study.asked
            name = f"phantom{study.id}"  # an underscore would end the patient
            image = Path(name, "0.png")
            image_path = folder / "images" / image
            image_path.parent.mkdir(parents=True, exist_ok=True)
            study.images[0].image.save(image_path)
            rows.append({"id": name, "report": report.answer, "image_path": [str(image)]})
        annotation[split] = rows
    write_atomically(path, json.dumps(annotation))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path)
    for split, size in {"train": 2000, "val": 300, "test": 600}.items():
        parser.add_argument(f"--{split}", type=int, default=size)
    sizes = vars(parser.parse_args())
    folder = sizes.pop("folder")
    if min(sizes.values()) < 1:
        raise InputError("expected at least one study in each split")
    try:
        write_phantoms(folder, sizes)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
