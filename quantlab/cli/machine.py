"""Commands about this machine: `info`, `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli.common import Device, Json, print_json, print_table, require_directory, wrong_call


def info(as_json: Json = False) -> None:
    """What is built, what this machine can use, and why the rest cannot be."""
    import quantlab

    found = quantlab.info()
    if as_json:
        print_json(found)
        return
    isa, cuda = found["isa"], found["cuda"]
    print(f"quantlab {found['version']}, built by {found['compiler']}, {found['threads']} threads\n")
    states = [(name, isa["built"][name], isa["usable"][name], isa["why_not"][name]) for name in isa["built"]]
    for name, built, usable, why_not in [*states, ("cuda", cuda["built"], cuda["usable"], cuda["why_not"])]:
        use = "in use" if name == isa["selected"] else "usable" if usable else "not usable"
        print(f"{name:13}{'built' if built else 'not built':11}{use:12}{why_not}".rstrip())
    if cuda["device"]:
        libraries = ", ".join(f"{name} {path}" for name, path in cuda["libraries"].items())
        print(f"\n{cuda['device']['name']}, {cuda['device']['memory'] / 2**30:.0f} GiB; {libraries}")


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to time; all without names.", show_default=False)] = None,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(help="Times that each case is measured on the CPU.")] = 7,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write one JSON line a case to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Time the kernels, each beside the roof that this machine has for it."""
    from quantlab import bench as engine
    from quantlab import bench_cuda

    if rounds < 1:
        raise typer.BadParameter(f"--rounds: got {rounds}, expected at least 1")
    if as_json is not None:
        require_directory(as_json.absolute().parent, "--json")
    with wrong_call():
        records = engine.run(ops or (), rounds=rounds) if device == "cpu" else bench_cuda.run(ops or ())
    if as_json is not None:
        engine.write_jsonl(records, as_json)
        print(f"{as_json}: {len(records)} cases")
        return
    header = ["op", "format", "shape", "variant", "median", "p90", "GB/s", "GFLOP/s", "of the roof"]
    print_table(header, [bench_row(record) for record in records])


def bench_row(record: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, record["shape"])) if isinstance(record["shape"], list | tuple) else str(record["shape"])
    rates = [f"{record[name]:.1f}" if record[name] else "" for name in ("gb_per_s", "gflop_per_s")]
    times = [f"{1e3 * record[name]:.3f} ms" for name in ("median_s", "p90_s")]
    roof = f"{record['roof_percent']:.0f} % {record['roof']}"
    return [record["op"], record["format"] or "", shape, record["variant"], *times, *rates, roof]
