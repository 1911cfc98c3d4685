"""A listener that keeps what it is told."""

from moe_bench.results.reading import Listener


class Heard:
    """What was skipped, noted and read."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.num_read = 0
        self.listener = Listener(
            on_skipped=self.skipped.append, on_note=self.notes.append, on_progress=self._on_progress
        )

    def _on_progress(self, num_done: int, num_files: int) -> None:
        assert 0 < num_done <= num_files
        self.num_read = num_done
