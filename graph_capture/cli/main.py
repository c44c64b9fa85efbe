"""The command line: ``graph-capture demo | chat | bench | inspect | view | kernels | cache``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

from graph_capture.cli.console import show_error

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


class DType(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class CacheAction(StrEnum):
    INFO = "info"
    CLEAR = "clear"


def _version(asked: bool) -> None:
    if asked:
        import graph_capture

        print(f"graph-capture {graph_capture.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Record a PyTorch forward pass, fuse it, replay it, with receipts."""


@app.command()
def demo(
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    hidden: Annotated[int, typer.Option(min=8, help="Hidden size.")] = 256,
    intermediate: Annotated[int, typer.Option(min=8, help="Size inside the MLP.")] = 688,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads (grouped-query attention).")] = 2,
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size.")] = 1024,
    length: Annotated[int, typer.Option(min=1, help="Tokens in the prompt.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the prompts.")] = 0,
    kernel: Annotated[str, typer.Option(help="The kind of region whose kernel is shown.")] = "add_rms_norm",
    graph: Annotated[bool, typer.Option("--graph", help="Also print the rewritten graph.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also time torch.compile.")] = False,
    plot: Annotated[str | None, typer.Option(help="A PNG for a bar chart of the times; needs matplotlib.")] = None,
    talk: Annotated[bool, typer.Option(help="End with a few questions to the tiny model that comes along.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON and nothing else.")] = False,
) -> None:
    """Record, fuse, check and replay a Llama, and talk to a tiny one; exits with 1 if a number or an answer is off."""
    from graph_capture.cli import demo as implementation

    if hidden % heads or heads % kv_heads:
        raise typer.BadParameter("--heads must divide --hidden, and --kv-heads must divide --heads")
    shape = implementation.Shape(layers, hidden, intermediate, heads, kv_heads, vocab, length, seed)
    console = Console(quiet=json)
    try:
        report = implementation.run(
            shape, console, kernel=kernel, show_graph=graph, compare=compare, plot=plot, talk=talk
        )
    except ImportError as error:
        raise typer.BadParameter(f"{error}; install graph-capture[plot] for --plot") from error
    if json:
        print(report.to_json())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-small and so on, a hub name.")],
    dtype: Annotated[DType, typer.Option(help="Of the weights.")] = DType.BFLOAT16,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = "",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 128,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the static cache.")] = 256,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers.")] = None,
    measure: Annotated[bool, typer.Option(help="Time each region; else decide by what is known of it.")] = True,
    why: Annotated[str | None, typer.Option(help="Only what became of this module, value or region.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the rewritten graph.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Record a model with random weights, or open a saved graph, and show what is found in it and what is decided."""
    import json as text

    import torch

    from graph_capture.cli.inspect import inspect as implementation
    from graph_capture.errors import CaptureError

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    explained = {}
    steps = implementation(
        model,
        dtype=getattr(torch, dtype),
        device=where,
        prompt=prompt,
        slots=slots,
        layers=layers,
        measure=measure,
    )
    try:
        for step, fused in steps:
            if json:
                explained[step] = text.loads(fused.explain().to_json())
                continue
            print(f"{step}: {len(fused.recorded.subgraph)} recorded ops, {len(fused.subgraph)} after the passes\n")
            print(f"{fused.why(why) if why else fused.explain()}\n")
            if graph:
                print(f"{fused.subgraph}\n")
    except (CaptureError, KeyError) as error:
        show_error(Console(stderr=True), error)
        raise typer.Exit(1) from error
    if json:
        print(text.dumps(explained, indent=2))


@app.command()
def view(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-small and so on, a hub name.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The page.")],
    dtype: Annotated[DType, typer.Option(help="Of the weights.")] = DType.BFLOAT16,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = "",
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Show a prefill of so many tokens, not a decode step.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the static cache.")] = 256,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers.")] = None,
    measure: Annotated[bool, typer.Option(help="Time each region; else decide by what is known of it.")] = True,
) -> None:
    """Write one page of HTML that shows each stage of a model, or of a saved graph: regions, decisions, sources."""
    import torch

    from graph_capture.cli.inspect import inspect as record
    from graph_capture.cli.view import write
    from graph_capture.errors import CaptureError

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    try:
        steps = record(model, dtype=kind, device=where, prompt=prompt or 1, slots=slots, layers=layers, measure=measure)
        step, fused = next(found for found in steps if prompt is None or not found[0].startswith("decode"))
        print(write(fused, output, model if step == "saved" else f"{model}: {step}"))
    except CaptureError as error:
        show_error(Console(stderr=True), error)
        raise typer.Exit(1) from error


@app.command()
def kernels(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-3-8b and the like, a hub name.")],
    target: Annotated[str, typer.Option(help="The GPU's architecture.")] = "sm_90",
    dtype: Annotated[DType, typer.Option(help="Of the weights.")] = DType.BFLOAT16,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 128,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the static cache.")] = 2048,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compile every kernel that a model needs, without a GPU and without its weights, and show the machine code."""
    import json as text

    import torch

    from graph_capture.cli.kernels import report
    from graph_capture.errors import CaptureError

    try:
        found = report(model, target, dtype=getattr(torch, dtype), prompt=prompt, slots=slots, layers=layers)
    except CaptureError as error:
        show_error(Console(stderr=True), error)
        raise typer.Exit(1) from error
    if json:
        print(text.dumps(found.to_dict(), indent=2))
        return
    console = Console()
    console.print(found.table())
    for kind, reason in found.refused.items():
        console.print(f"no kernel for {kind}: {reason}", soft_wrap=True, highlight=False)


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Option(help="A folder, llama-tiny and the like, a hub name (default: a tiny Llama of ours).")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights (default: as they are stored).")] = None,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a conversation (default: what the model and memory allow).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most likely token (default, here and below: as the model has it).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens; 0: among all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the fewest tokens that are this likely together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than this part of the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1: none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random choices.")] = None,
    fusion: Annotated[bool, typer.Option(help="Capture and fuse the model's steps.")] = True,
    system: Annotated[str | None, typer.Option(help="A message that says how to answer.")] = None,
) -> None:
    """Talk to a model; answers lines from a pipe too. Exits with 1 if a line got no answer."""
    import torch

    from graph_capture.cli.chat import run
    from graph_capture.errors import CaptureError

    try:
        ok = run(
            model,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            fusion=fusion,
            system=system,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    except CaptureError as error:
        show_error(Console(stderr=True), error)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if ok else 1)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="A model's folder, or a name on the hub.")] = "",
    config: Annotated[str, typer.Option(help="A built-in configuration with random weights: llama-3-8b ...")] = "",
    dtype: Annotated[DType | None, typer.Option(help="Of the weights (default: as stored).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = "",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded, in each round.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the ways take turns.")] = 5,
    starts: Annotated[bool, typer.Option(help="Also measure cold and warm starts, in processes of their own.")] = True,
    compare: Annotated[bool, typer.Option(help="Also measure torch.compile.")] = True,
    plot: Annotated[str | None, typer.Option(help="A PNG for a bar chart; needs matplotlib.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as markdown.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Time a model end to end: eager transformers, torch.compile, the engine without and with fusion."""
    import json as text

    import torch

    from graph_capture.cli import bench as implementation
    from graph_capture.cli.ways import COMPILED, WAYS, Setting
    from graph_capture.errors import CaptureError

    if bool(model) == bool(config):
        raise typer.BadParameter("give either --model or --config")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        model or config,
        where,
        dtype or "auto",
        prompt,
        tokens,
        batch,
        rounds,
        0 if where == "cuda" else torch.get_num_threads(),
    )
    ways = tuple(way for way in WAYS if compare or way != COMPILED)
    console = Console(stderr=True)
    try:
        if plot:
            import matplotlib.pyplot  # noqa: F401
        with console.status("...") as status:
            report = implementation.run(setting, ways, starts=starts, progress=status.update)
    except ImportError as error:
        raise typer.BadParameter(f"{error}; install graph-capture[plot] for --plot") from error
    except CaptureError as error:
        show_error(console, error)
        raise typer.Exit(1) from error
    if plot:
        implementation.plot(report, plot)
    if json:
        print(text.dumps(report.to_dict(), indent=2))
    elif markdown:
        print(report.markdown())
    else:
        Console().print(report.table())
    if not json:
        for line in report.notes():
            print(line)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show what there is, or remove it.")] = CacheAction.INFO,
    folder: Annotated[str | None, typer.Option(help="The cache folder (default: the user's).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show or clear the folder of compiled kernels, measured decisions and recorded patterns."""
    import json as text

    from graph_capture.cache import Usage, cache_folder, clear, contents, size_limit
    from graph_capture.runtime.account.explain import format_bytes
    from graph_capture.runtime.decide.decision_store import DecisionStore

    path = cache_folder(folder)
    if action is CacheAction.CLEAR:
        count, size = clear(path)
        print(text.dumps({"path": str(path), "removed": count, "bytes": size})) if json else Console().print(
            f"removed {count} files, {format_bytes(size)}, from {path}", soft_wrap=True
        )
        return
    kinds = {"kernels": Usage()} | contents(path)
    kinds["decisions"] = kinds.get("decisions", Usage())._replace(entries=len(DecisionStore(folder)))
    limit = size_limit()
    if json:
        print(
            text.dumps({"path": str(path), **{kind: usage._asdict() for kind, usage in kinds.items()}, "limit": limit})
        )
        return
    table = Table(box=SIMPLE_HEAD)
    for column, justify in (("what", "left"), ("entries", "right"), ("files", "right"), ("bytes", "right")):
        table.add_column(column, justify=cast(JustifyMethod, justify))
    for kind, usage in sorted(kinds.items()):
        table.add_row(kind, str(usage.entries), str(usage.files), format_bytes(usage.bytes))
    table.add_section()
    files, size = (sum(getattr(usage, name) for usage in kinds.values()) for name in ("files", "bytes"))
    table.add_row("all", "", str(files), format_bytes(size))
    table.add_row("at most", "", "", format_bytes(limit) if limit else "no limit")
    Console().print(str(path), soft_wrap=True)
    Console().print(table)


def main() -> None:
    """The entry point of ``graph-capture``."""
    app()


if __name__ == "__main__":
    main()
