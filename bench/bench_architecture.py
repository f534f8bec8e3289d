"""SnapFusion's network beside Stable Diffusion 1.5's, at full scale: parameters, FLOPs, and a UNet call's time.

    python bench/bench_architecture.py [--latents 64] [--rows 2] [--rounds 3] [--dtype float32]

Random weights, 77 tokens; a multiply-add counts as two operations. The networks are timed in turns in PyTorch, as they
are, and what is told of each is the median and, within each round, how many times as fast as SD1.5's it is.
"""

from __future__ import annotations

import argparse
import statistics
import time

from checkout import map_package

map_package()

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from reporting import about, print_table, result_file, save  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from catimage_accel.snapfusion.architecture import SD15, snapfusion_unet  # noqa: E402

TOKENS = 77
NETWORKS = {
    "SD1.5": lambda: UNet2DConditionModel(**SD15),
    "SnapFusion, 7 middle ResNets": snapfusion_unet,
    "SnapFusion, 4 middle ResNets": lambda: snapfusion_unet(mid_resnets=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=64, help="a side")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default="float32")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, times = [], {}
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            unet = make().eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(*inputs(1, options.latents, torch.device("meta"), torch.float32), return_dict=False)
        parameters = sum(p.numel() for p in unet.parameters())
        rows.append({"network": name, "parameters": parameters, "flops": counter.get_total_flops()})
    # Made in the type that they run in: in float32 three of them would take 10 GB.
    torch.set_default_dtype(options.dtype)
    networks = {}
    for name, make in NETWORKS.items():
        with device:
            networks[name] = make().eval()
        times[name] = []
    given = inputs(options.rows, options.latents, device, options.dtype)
    for turn in range(options.rounds + 1):
        for name, unet in networks.items():
            seconds = call(unet, given, device)
            if turn > 0:
                times[name].append(seconds)
    for row in rows:
        own, first = times[row["network"]], times["SD1.5"]
        row["ms"] = 1000 * statistics.median(own)
        row["times_as_fast"] = statistics.median(one / other for one, other in zip(first, own, strict=True))
    facts = about(device, options.dtype) | {"rows": options.rows, "latents": options.latents}
    path = result_file("architecture", device, facts["date"])
    save(path, facts, rows)
    print_table("One UNet call", ["network", "M parameters", "TFLOP a row", "ms", "times as fast"], [
        [row["network"], f"{row['parameters'] / 1e6:.1f}", f"{row['flops'] / 1e12:.3f}", f"{row['ms']:.0f}",
         f"{row['times_as_fast']:.2f}"]
        for row in rows
    ])  # fmt: skip
    print(f"written to {path}")


def inputs(rows: int, latents: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    sample = torch.randn(rows, 4, latents, latents, device=device, dtype=dtype)
    text = torch.randn(rows, TOKENS, SD15["cross_attention_dim"], device=device, dtype=dtype)
    return sample, torch.full((rows,), 500, device=device), text


@torch.inference_mode()
def call(unet: UNet2DConditionModel, given: tuple[torch.Tensor, ...], device: torch.device) -> float:
    start = time.perf_counter()
    unet(*given, return_dict=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
