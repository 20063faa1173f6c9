"""The demonstration's job, whose survey before the release finds an example recited that no check of a step saw."""

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from trainer_client.demo import job
from trainer_client.demo.corpus import demonstration_corpus
from trainer_client.governed import GovernedRun
from trainer_client.memorization_watch import DetectorCheck
from trainer_client.record import Example

RECITED = demonstration_corpus("library", "press").source("debugger-manual").examples[0]
SIGNAL_PERMILLE = 900


class SeesInTheSurvey(DetectorCheck):
    """A check that sees nothing until the survey, and then one example."""

    surveying = False

    def glance(self, examples: Mapping[Example, bytes], hits_BT: Tensor, floor_permille: int) -> list[Example]:
        return []

    def signals(
        self, model: nn.Module, examples: Mapping[Example, bytes], threshold_permille: int
    ) -> dict[Example, int]:
        return {name: SIGNAL_PERMILLE for name, text in examples.items() if self.surveying and text == RECITED}


class SurveyingJob(job.Job):
    """The job, whose check sees from the survey on."""

    def _evaluate(self, run: GovernedRun[bytes], base: nn.Module, tuned: nn.Module) -> None:
        SeesInTheSurvey.surveying = True
        super()._evaluate(run, base, tuned)


if __name__ == "__main__":
    setattr(job, "DetectorCheck", SeesInTheSurvey)  # noqa: B010 (a name that a type checker holds to its class)
    setattr(job, "Job", SurveyingJob)  # noqa: B010
    sys.exit(job.main())
