"""The shapes of a graph's inputs in a shape profile."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from catimage_accel.engines.components import ShapeProfile

__all__ = ["check_inputs", "input_shape"]


def input_shape(name: str, known: tuple[int, ...], profile: ShapeProfile, rows: int) -> tuple[int, ...]:
    """The shape of an input whose dimensions are ``known`` but for those of -1.

    Rows come first; four dimensions are an image's, (rows, channels, height, width); "encoder_hidden_states" is (rows,
    tokens, features). ValueError for other dimensions that the file leaves open.
    """
    shape = [rows, *known[1:]]
    if len(known) == 4:
        shape[2:] = profile.height, profile.width
    elif name == "encoder_hidden_states":
        shape[1:] = profile.tokens, profile.text_features
    if min(shape) < 1:
        raise ValueError(f"{name} is {known} in the file; accepted: -1 for rows, height, width and tokens only")
    return tuple(shape)


def check_inputs(inputs: Mapping[str, Tensor], profile: ShapeProfile) -> tuple[int, int]:
    """The number of rows of ``inputs`` and the place in ``profile.rows`` of the batch size that holds them.

    ValueError if the inputs' rows differ, or their sizes are not the profile's.
    """
    counts = {name: len(value) if value.ndim else 0 for name, value in inputs.items()}
    rows = max(counts.values(), default=0)
    if set(counts.values()) != {rows} or rows < 1:
        raise ValueError(f"the inputs' rows are {counts}; accepted: one number from 1 for all")
    bucket = profile.bucket(rows)
    if bucket is None:
        raise ValueError(f"the inputs have {rows} rows; accepted: up to {profile.rows[-1]}, of {profile.rows}")
    for name, value in inputs.items():
        expected = input_shape(name, tuple(value.shape), profile, rows)
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} is {tuple(value.shape)}; accepted: {expected}, what the engine is built for")
    return rows, profile.rows.index(bucket)
