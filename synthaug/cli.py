"""The command line: arguments in, exit codes out. Everything heavy is imported when a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthaug import __version__

app = typer.Typer(
    name="synthaug",
    help="Balanced, defensible synthetic samples for scarce image classes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The job: a YAML file.")]
Output = Annotated[str | None, typer.Option("--output", metavar="DIRECTORY", help="Run folder, in place of 'output:'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; logs stay on stderr.")]
Synthetic = Annotated[
    str | None,
    typer.Option(
        "--synthetic", metavar="FOLDER_OR_DATASET", help="Images that another tool made, in place of the job's own."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More log lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"synthaug {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    config: ConfigPath,
    output: Output = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Dry run: read and split the dataset and show what each class shall have. Trains nothing."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.config import load_config
        from synthaug.errors import PlanError
        from synthaug.pipeline import plan_only
        from synthaug.plan import nothing_to_raise

        job = load_config(config, output=output)
        here.output = job.output_path
        summary = plan_only(job)
        problem = nothing_to_raise(summary.plan)
        terminal.show_plan(here, summary, problem)
        if problem:
            # The object is out already, with the problem in it; stdout holds one and no second.
            here.as_json = False
            raise PlanError(problem)


@app.command()
def run(
    config: ConfigPath,
    output: Output = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The whole job: from the dataset to a balanced release. What is complete already is reused."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.config import load_config
        from synthaug.pipeline import augment

        job = load_config(config, output=output)
        here.output = job.output_path
        terminal.show_run(here, augment(job))


@app.command()
def evaluate(
    config: ConfigPath,
    synthetic: Synthetic = None,
    output: Output = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The verdict: do the synthetic images help, at which dose, against what anyone could do for free?

    Runs what is missing of the job up to there and releases nothing. With --synthetic, images that another tool made
    are tried in place of the job's own, and no generator is trained.
    """
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug import pipeline
        from synthaug.config import load_config

        job = load_config(config, output=output)
        here.output = job.output_path
        summary = pipeline.evaluate(job) if synthetic is None else pipeline.evaluate_foreign(job, synthetic)
        terminal.show_verdict(here, summary.verdict, summary.pictures, summary.verdict_file)


@app.command()
def audit(
    config: ConfigPath,
    synthetic: Annotated[
        str, typer.Option("--synthetic", metavar="FOLDER_OR_DATASET", help="Images that another tool made.")
    ],
    output: Output = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Audit images that another tool made: copies, wrong classes, coverage. The job's own are audited by `run`."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.config import load_config
        from synthaug.pipeline import audit_foreign

        job = load_config(config, output=output)
        here.output = job.output_path
        terminal.show_audit(here, audit_foreign(job, synthetic))


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="Folder of a release.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hold a release against its manifest. Exit code 1 where they do not agree."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.verify import verify as verify_release

        result = verify_release(release)
        terminal.show_verify(here, result)
        if not result.ok:
            raise SystemExit(terminal.FAILED)


@app.command()
def remake(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="Folder of a release; its shards may be gone.")],
    sample: Annotated[
        list[str] | None, typer.Option("--sample", metavar="ID", help="A sample; give it again for more.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All samples.")] = False,
    number: Annotated[int | None, typer.Option("--random", metavar="N", help="N samples drawn at random.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of --random.")] = 0,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint", metavar="DIR", help="In place of the one in the run folder; give it again for more."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make samples again from their manifest rows and the checkpoint, and compare. Exit code 1 where they differ."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.errors import UsageError
        from synthaug.remake import remake as remake_samples

        if sum((bool(sample), everything, number is not None)) != 1:
            raise UsageError("say which samples to make again: either --sample ID, or --all, or --random N.")
        result = remake_samples(release, samples=sample or None, draw=number, seed=seed, checkpoint=checkpoint)
        terminal.show_remake(here, result)
        if not result.ok:
            raise SystemExit(terminal.FAILED)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the 'output' of a job.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write report.html of a run folder again, from its records alone; of a job half done, what there is."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.rebuild import rebuild

        terminal.show_rebuild(here, rebuild(run))


@app.command()
def affected(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders to look through.")],
    image: Annotated[str | None, typer.Option("--image", metavar="ID", help="An image_id.")] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="KEY", help="A group_key, or a group's own name.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """For the day a patient withdraws: every checkpoint and release that an image or group went into, and how."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.affected import affected as find_affected

        result = find_affected(runs, image=image, group=group)
        terminal.show_affected(here, result)
        if result.unreadable:
            raise SystemExit(terminal.FAILED)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    why: Annotated[
        Path | None,
        typer.Option("--why", metavar="CONFIG", help="The job: says of every stage why it is reused or done again."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """How a run folder stands: what is done, what it cost, what comes next, who is at work. Changes nothing."""
    from synthaug import terminal

    with terminal.session(as_json=as_json, verbosity=verbose - quiet, debug=debug) as here:
        from synthaug.config import load_config
        from synthaug.status import status as look_at

        job = None if why is None else load_config(why, output=str(run.absolute()))
        terminal.show_status(here, look_at(run, job))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Run a job on a schedule, as a Prefect flow: serve CONFIG --cron "0 2 * * *". Ends with Ctrl-C.

    CONFIG [--cron CRON | --interval SECONDS] [--flow refresh|augment|evaluate] [--output DIRECTORY] [--port PORT]
    [--debug]
    """
    # The flows stand above the command line, which knows them by name only and makes way for them.
    import os
    import sys

    # In the repository they stand beside the package, in the wheel they are part of it.
    root = Path(__file__).resolve().parent.parent
    name = "flows.serve" if (root / "flows" / "serve.py").is_file() else "synthaug.flows.serve"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    os.execve(sys.executable, [sys.executable, "-m", name, *context.args], environment)


def main() -> None:
    """Run the command line; always leaves by SystemExit."""
    app()
