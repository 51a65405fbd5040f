"""Which run is next: trials first, then the best setting of each optimizer with every seed."""

from dataclasses import dataclass

from optuna.trial import FrozenTrial, Trial

from mars_lab.sweep.claim import Claim, alone, claim
from mars_lab.sweep.plan import Plan
from mars_lab.sweep.studies import Studies
from mars_lab.training.config import RunConfig
from mars_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run to be done, or to be continued, by the process that holds `claim`; `trial` is None for a final run."""

    optimizer: str
    folder: RunFolder
    config: RunConfig
    claim: Claim
    trial: Trial | None = None


class Queue:
    """Hands out runs. A trial that its process left unfinished, whatever ended it, is handed out again."""

    def __init__(self, plan: Plan, studies: Studies) -> None:
        self._plan, self._studies = plan, studies

    def next(self) -> Job | None:
        """A run that nobody works on; None if there is none now."""
        with alone(self._plan.folder):
            return self._trial() or self._final()

    def is_empty(self) -> bool:
        """Whether everything has come to an end."""
        return all(
            self._is_tuned(name)
            and (
                self._studies.best(name) is None
                or all(self._plan.final_run(name, seed).summary() for seed in self._plan.final_seeds)
            )
            for name in self._plan.optimizers
        )

    def _trial(self) -> Job | None:
        for name in self._plan.optimizers:
            for frozen in self._studies.trials(name):
                if not frozen.state.is_finished() and (job := self._continued(name, frozen)) is not None:
                    return job
        counts = {name: len(self._studies.trials(name)) for name in self._plan.optimizers}
        name = min(counts, key=lambda name: counts[name])
        if counts[name] >= self._plan.num_trials:
            return None
        trial = self._studies.ask(name)
        right = claim(self._plan.tuning_run(name, trial.number).path)
        assert right is not None, "the trial is new"
        return self._job(name, trial, right)

    def _continued(self, name: str, frozen: FrozenTrial) -> Job | None:
        """A trial whose process is gone; None where it is not."""
        right = claim(self._plan.tuning_run(name, frozen.number).path)
        if right is None:
            return None
        if self._studies.trials(name)[frozen.number].state.is_finished():  # in the meantime
            right.release()
            return None
        return self._job(name, self._studies.reopened(name, frozen), right)

    def _job(self, name: str, trial: Trial, right: Claim) -> Job:
        config = self._plan.run_config(name, trial.params)
        return Job(name, self._plan.tuning_run(name, trial.number), config, right, trial)

    def _final(self) -> Job | None:
        for name in self._plan.optimizers:
            if not self._is_tuned(name) or (point := self._studies.best(name)) is None:
                continue
            for seed in self._plan.final_seeds:
                folder = self._plan.final_run(name, seed)
                if folder.summary() is None and (right := claim(folder.path)) is not None:
                    return Job(name, folder, self._plan.run_config(name, point, seed), right)
        return None

    def _is_tuned(self, name: str) -> bool:
        trials = self._studies.trials(name)
        return len(trials) >= self._plan.num_trials and all(trial.state.is_finished() for trial in trials)
