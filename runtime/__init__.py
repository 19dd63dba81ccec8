"""What any long run needs: configuration, checkpoints, processes and logs."""
