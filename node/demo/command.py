"""``countersign demo``: options, exit codes, and how it ends.

Exit codes: 0 everything was checked and holds; 1 a check says no, or something failed; 2 wrongly asked; 128 + n on
signal n (130 for Ctrl-C). Whatever the ending, no process is left and the logs stay.
"""

import time
from pathlib import Path

import click

from consensus.rejection import ConfigError, CountersignError
from node.demo.closing import ways_to_ask
from node.demo.display import Display
from node.demo.processes import Processes, Stopped, stop_signals
from node.demo.story import Options, Story
from node.demo.training import TrainingOptions

DEFAULT_STEPS = 180
WATCH_SECONDS = 1.0


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="Where everything goes; an earlier demo run there is replaced.",
)
@click.option("--keep", is_flag=True, help="Refuse to replace an earlier demo run.")
@click.option(
    "--keep-running", is_flag=True, help="Leave the nodes up afterwards, until Ctrl-C, and say how to ask them."
)
@click.option("--quiet", is_flag=True, help="Print only how it ended.")
@click.option(
    "--steps",
    type=click.IntRange(24, 2_000),
    default=DEFAULT_STEPS,
    show_default=True,
    help="Training steps. With few of them less is learned and nothing may be recited.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path(".cache/countersign"),
    show_default=True,
    help="Where the base model is kept once it is trained.",
)
@click.option("--base-steps", type=click.IntRange(min=1), hidden=True, help="Train the base model this briefly.")
@click.option("--job-module", default="trainer_client.demo.job", hidden=True, help="Run this module as the job.")
@click.pass_context
def demo_command(
    context: click.Context,
    out: Path,
    keep: bool,
    keep_running: bool,
    quiet: bool,
    steps: int,
    cache: Path,
    base_steps: int | None,
    job_module: str,
) -> None:
    """Run a whole consortium and one governed fine-tune on this machine.

    Five nodes, real text, a small language model; one source with the wrong licence, one for another purpose, one
    withdrawn in mid-run, one that the model starts to recite, measured against the sources' own reserves; depth by
    content class and by how unlikely a text is; a node killed on the way. What it recites in the end, found too late to
    undo, is governance's to decide about. Before the release another than the operator takes over what tracing needs.
    Then the proofs.

    \b
    Examples:
      countersign demo
      countersign demo --out trial --keep-running
    """
    display = Display(quiet=quiet)
    options = Options(out, keep, TrainingOptions(steps, cache, base_steps, job_module))
    try:
        with stop_signals(), Processes() as processes:
            facts, consortium = Story(options, display, processes).tell()
            display.always(f"report   {out / 'report.html'}\ntraces   {out / 'trace.html'}")
            display.always(f"summary  {out / 'summary.json'}")
            if keep_running:
                display.always("The nodes are up until Ctrl-C. Ask them:")
                display.always("\n".join(f"  {line}" for line in ways_to_ask(consortium, facts)))
                while True:
                    time.sleep(WATCH_SECONDS)
                    consortium.check()
    except Stopped as stopped:
        display.always(f"stopped by {stopped}; no process is left, logs stay in {out}")
        context.exit(128 + stopped.number)
    except ConfigError:
        raise
    except CountersignError as error:
        click.echo(f"error: {error}\nall logs are in {out}", err=True)
        context.exit(1)
    display.always("everything checked holds" if facts.passed else "a check does not hold: see above")
    context.exit(0 if facts.passed else 1)
