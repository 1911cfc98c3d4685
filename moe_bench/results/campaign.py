"""Everything that is to be measured on one GPU, as a list of commands and what came of each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import TypeAdapter

from moe_bench.results.journal import (
    LineJournal,
    begin_journal,
    file_stem,
    gpu_folder,
    read_journal,
    require_alike,
)
from moe_bench.results.record import GitState
from moe_bench.results.store import CAMPAIGN_FOLDER
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, PositiveFloat, Spec, Text

SCHEMA_VERSION = 1


class Step(Spec):
    """One command of a campaign."""

    key: Text
    """Unique in its campaign, as `slice deepseek_v3 torch_native`."""
    question: Text
    """What its answer tells."""
    program: Literal["moe-bench", "pytest"] = "moe-bench"
    arguments: tuple[Text, ...]
    """What follows the program's name."""


class StepOutcome(Spec):
    """What came of a step."""

    step: Step
    exit_code: int | None
    """None where it was not started."""
    reason: Text | None
    """Why it was not started, or the last line that it printed before it failed; None where it ended well."""
    started_at: Text
    """UTC, ISO 8601."""
    wall_s: NonNegativeFloat
    files: tuple[Text, ...]
    """What it wrote, relative to the root of the results."""

    @property
    def is_done(self) -> bool:
        """Whether it measured what it was to measure."""
        return self.exit_code == 0


class CampaignHeader(Spec):
    """What is known before the first step."""

    journal_version: Literal[1] = 1
    is_tiny: bool
    started_at: Text
    command: tuple[Text, ...]
    job_id: Text
    git: GitState
    packages: dict[str, str]
    gpu_name: Text
    driver_version: Text | None
    budget_s: PositiveFloat | None

    @property
    def stem(self) -> str:
        """`<start>-<commit>-<job>`."""
        return file_stem(started_at=self.started_at, commit=self.git.short_name, job_id=self.job_id)


class Campaign(Spec):
    """A campaign that has ended, written once; the measurements lie in the files that its outcomes name."""

    schema_version: Literal[1] = 1
    header: CampaignHeader
    outcomes: tuple[StepOutcome, ...]


class CampaignJournal(LineJournal[CampaignHeader, StepOutcome]):
    """A campaign that is under way."""

    @classmethod
    def start(cls, root: Path, header: CampaignHeader) -> Self:
        """A new one, `<root>/campaigns/<gpu>/.<start>-<commit>-<job>.unfinished`."""
        folder = campaign_folder(root, header.gpu_name)
        return cls(begin_journal(folder, header.stem, header), header)

    @classmethod
    def resume(cls, path: Path, here: CampaignHeader) -> Self:
        """The one in `path`, to be gone on with by a process whose header would be `here`.

        Raises BadInputError where the rest would be measured with other software or on another GPU.
        """
        header, outcomes = read_journal(path, CampaignHeader, _OUTCOMES, command="h100")
        facts = (
            ("--tiny", header.is_tiny, here.is_tiny),
            ("GPU", header.gpu_name, here.gpu_name),
            ("driver", header.driver_version, here.driver_version),
            ("commit", header.git.short_name, here.git.short_name),
            ("packages", header.packages, here.packages),
        )
        require_alike(path, facts)
        return cls(path, header, outcomes)

    @property
    def outcomes(self) -> tuple[StepOutcome, ...]:
        """The last of each step."""
        return tuple({outcome.step.key: outcome for outcome in self.entries}.values())

    @property
    def done(self) -> frozenset[str]:
        """Keys of the steps that have an outcome, good or bad."""
        return frozenset(outcome.step.key for outcome in self.entries)

    @property
    def failed(self) -> frozenset[str]:
        """Keys of the steps that did not end well, those that were not started among them."""
        return frozenset(outcome.step.key for outcome in self.outcomes if not outcome.is_done)

    @property
    def log_folder(self) -> Path:
        """Where each step's own output is kept."""
        return self.path.with_name(f"{self.header.stem}-logs")

    def finish(self) -> Path:
        """Write the campaign file beside the journal, and drop the journal."""
        return self.close_into(Campaign(header=self.header, outcomes=self.outcomes))


_OUTCOMES = TypeAdapter(StepOutcome)


def campaign_folder(root: Path, gpu_name: str) -> Path:
    """`<root>/campaigns/<gpu>`."""
    return gpu_folder(root, CAMPAIGN_FOLDER, gpu_name)


def read_campaign(path: Path) -> Campaign:
    """The campaign in `path`; RecordError names the file, the field and what is wrong with it."""
    return read_versioned(path, Campaign, what="campaign file", version=SCHEMA_VERSION)
