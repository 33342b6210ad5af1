"""``fisherkit fapm``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherkit.checkpoint.target import check_apart
from fisherkit.cli import console, shared
from fisherkit.cli import sweep as sweeps
from fisherkit.cli.app import OUTPUT, Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.fapm_sweep import sweep_fapm
from fisherkit.cli.run_options import (
    ChatTemplate,
    Device,
    DType,
    Field,
    GroupSize,
    Limit,
    Loss,
    MaxLength,
    TrustRemoteCode,
    run_options,
)
from fisherkit.cli.shared import Base, Nan, Only, Report, Rest, Seed, Shard, ShardSize, Skip, Tuned
from fisherkit.cli.sweep import BudgetText, Controls, Prompts, Samples
from fisherkit.errors import OptionError
from fisherkit.options import FapmOptions, Metric, parse_shares
from fisherkit.options.merge import Scope

if TYPE_CHECKING:
    from fisherkit.methods.merge.fapm_report import FapmReport

KEEP = "What is kept"


@app.command(cls=Command)
def fapm(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder to make.")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of entries that goes back to BASE: 0.9; 0.1 for adapters.", rich_help_panel=KEEP),
    ] = None,
    density: Annotated[float | None, typer.Option(help="The same, as the share kept.", rich_help_panel=KEEP)] = None,
    metric: Annotated[Metric, typer.Option(help="By what entries are kept.", rich_help_panel=KEEP)] = "fapm",
    scope: Annotated[Scope, typer.Option(help="What the quota holds for.", rich_help_panel=KEEP)] = "tensor",
    only: Only = None,
    skip: Skip = None,
    rest: Rest = "tuned",
    nan: Nan = "refuse",
    seed: Seed = 0,
    resume: Resume = False,
    shard: Shard = None,
    max_shard_size: ShardSize = None,
    sparse: Annotated[
        Path | None,
        typer.Option(help="Also write the kept entries alone; merge applies them.", rich_help_panel=OUTPUT),
    ] = None,
    report: Report = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw what was kept, or a scored sweep: .html, .svg or .png.", rich_help_panel=OUTPUT),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Report on these sparsities: 0.5,0.9,0.95; with --prompts, score them.", rich_help_panel=sweeps.SWEEP
        ),
    ] = None,
    prompts: Prompts = None,
    budget: BudgetText = None,
    controls: Controls = False,
    samples: Samples = None,
    field: Field = None,
    limit: Limit = 200,
    max_length: MaxLength = 256,
    chat_template: ChatTemplate = "auto",
    loss: Loss = "auto",
    group_size: GroupSize = 8,
    dtype: DType = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.", rich_help_panel=OUTPUT)
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep the part of a fine-tune that costs BASE least, and put BASE back everywhere else.

    Example: fisherkit fapm org/base my-fine-tune out --sparsity 0.9
    """

    def command() -> None:
        options = FapmOptions(
            sparsity=sparsity,
            density=density,
            metric=metric,
            scope=scope,
            seed=seed,
            **shared.pair_options(
                only=only,
                skip=skip,
                rest=rest,
                nan=nan,
                max_shard_size=max_shard_size,
                resume=resume,
                force=force,
                shard=shard,
            ),
        )
        shares = parse_shares("sweep", sweep) if sweep is not None else None
        measured = sweeps.ask(
            prompts,
            budget,
            run_options(
                field=field,
                limit=limit,
                max_length=max_length,
                chat_template=chat_template,
                loss=loss,
                group_size=group_size,
                dtype=dtype,
                device=device,
                resume=resume,
                trust_remote_code=trust_remote_code,
                force=force,
            ),
            controls=controls,
            outputs=(out, sparse),
            figures=report,
            picture=figure,
            samples=samples,
        )
        if shares is not None and measured is None and out is not None:
            raise OptionError(
                "--sweep without --prompts only reports; drop OUT, or add --prompts to write the best point"
            )
        if dry_run and (shares is not None or report is not None):
            raise OptionError("--dry-run writes nothing and tries nothing out; it goes without --sweep and --report")
        if measured is not None:
            if shares is None or dry_run:
                raise OptionError("--prompts is for --sweep: it scores the sparsities that --sweep lists")
            sweep_fapm((base, tuned), options, shares, measured, as_json=as_json, quiet=quiet)
            return
        _check(out, sparse, report, figure, alone=shares is not None or dry_run, force=force)
        from fisherkit.methods.merge import fapm as methods
        from fisherkit.methods.merge import fapm_preview

        say, track = sayer(quiet), console.tracker("fapm", quiet=quiet)
        if dry_run:
            console.show_facts(fapm_preview.plan_fapm(base, tuned, options, say=say), as_json=as_json)
        elif shares is not None:
            if report is not None:
                check_apart((report,), (Path(base), Path(tuned)), None)
            swept = fapm_preview.sweep_fapm(base, tuned, shares, options, track=track, say=say)
            _show_sweep(swept, report, as_json=as_json)
        else:
            made = methods.fapm(
                base,
                tuned,
                out,
                options,
                sparse=sparse,
                beside=_beside(report, figure),
                figure=figure is not None,
                command=shared.typed(),
                track=track,
                say=say,
            )
            console.say_kept(made.totals, selects=options.selects, quiet=quiet or bool(made.missing))
            shared.show_made(made, out or sparse or report or figure, as_json=as_json)

    written = out or sparse or report or figure
    hint = sweeps.hint((out, sparse), samples, figure, report) if prompts else shared.hint(written)
    run(command, debug=debug, hint=hint)


def _check(
    out: Path | None, sparse: Path | None, report: Path | None, figure: Path | None, *, alone: bool, force: bool
) -> None:
    """Refuse before any work what could only fail after it."""
    if alone and (sparse or figure):
        raise OptionError("--sweep and --dry-run only report; they go without --sparse and --figure")
    if not alone and not (out or sparse or report or figure):
        raise OptionError("nothing to write: give OUT, or one of --sparse, --report, --figure, --sweep, --dry-run")
    from fisherkit.render.files import check_figure, check_report

    if report is not None:
        check_report(report, force=force or not alone)  # the run itself knows what a killed one has put there
    if figure is not None:
        check_figure(figure, force=True)


def _beside(report: Path | None, figure: Path | None) -> "dict[Path, Callable[[FapmReport], bytes]]":
    """Return what is made of the report, by path."""
    from fisherkit.render.files import pruning_bytes

    made: dict[Path, Callable[[FapmReport], bytes]] = {**shared.report_beside(report)}
    if figure is not None:
        made[figure] = lambda one: pruning_bytes(one, figure.suffix.lower())
    return made


def _show_sweep(reports: "Sequence[FapmReport]", report: Path | None, *, as_json: bool) -> None:
    from fisherkit.checkpoint.atomic import write_json
    from fisherkit.methods.inspect.records import render

    whole = {"sweep": [one.as_json() for one in reports]}
    if report is not None:
        write_json(report, whole)
    rows = [
        {"sparsity": round(1 - one.density, 12), "kept": one.totals["kept"], "energy_kept": one.totals["energy_kept"]}
        for one in reports
    ]
    typer.echo(
        json.dumps(whole, indent=1) if as_json else render(rows, ("sparsity", "kept", "energy_kept"), "tsv"), nl=as_json
    )
