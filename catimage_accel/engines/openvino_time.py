"""The embedding of the timestep, and of SDXL's sizes, apart from the UNet: in float32 when the UNet is not."""

from __future__ import annotations

from typing import Any

from catimage_accel.engines.protocol import ADDED_CONDITIONS
from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["EMBEDDED", "time_alone", "without_time"]

EMBEDDED = {"timestep": "time_features", "time_ids": "added_features"}
"""Inputs whose sines are taken -> the name of what goes into a matrix in their place."""
_INPUTS = {"sample", *EMBEDDED, *ADDED_CONDITIONS}  # of the embeddings: rows are counted by the sample's


def time_alone(model: Any) -> Any:
    """Of a UNet's ``openvino.Model``: the parts before the first matrix of each embedding, in ``EMBEDDED``'s order."""
    import openvino

    sources = [_first_matrix(model, name).get_source_output() for name in _embedded(model)]
    parameters = [one for one in model.get_parameters() if _names(one) & _INPUTS]
    return openvino.Model(sources, parameters, "time")


def without_time(model: Any) -> Any:
    """The same model with those parts' results as the inputs named in ``EMBEDDED``; changes ``model``."""
    import openvino
    from openvino import opset13

    matrices = {name: _first_matrix(model, name) for name in _embedded(model)}
    added = []
    for name, matrix in matrices.items():
        features = opset13.parameter(matrix.get_partial_shape(), openvino.Type.f32, EMBEDDED[name])
        features.output(0).set_names({EMBEDDED[name]})
        matrix.replace_source_output(features.output(0))
        added.append(features)
    parameters = [one for one in model.get_parameters() if not _names(one) & {*EMBEDDED, *ADDED_CONDITIONS}]
    return openvino.Model(model.get_results(), [*parameters, *added], "without time")


def _embedded(model: Any) -> list[str]:
    known = {name for one in model.get_parameters() for name in _names(one)}
    return [name for name in EMBEDDED if name in known]


def _first_matrix(model: Any, name: str) -> Any:
    """The input of a multiplication by weights that the model's input ``name`` goes into."""
    [parameter] = [one for one in model.get_parameters() if name in _names(one)]
    found, seen, reached = [], set(), [parameter]
    while reached:
        node = reached.pop()
        for target in (target for output in node.outputs() for target in output.get_target_inputs()):
            reader = target.get_node()
            if reader.get_type_name() == "MatMul":
                found.append(target)
            elif reader.get_friendly_name() not in seen:
                seen.add(reader.get_friendly_name())
                reached.append(reader)
    if len(found) != 1:
        raise EngineUnavailable(
            f"openvino has no bfloat16 for this UNet: its {name} goes into {len(found)} matrices, not 1; use 'fp32'"
        )
    return found[0]


def _names(parameter: Any) -> set[str]:
    names: set[str] = parameter.output(0).get_names()
    return names
