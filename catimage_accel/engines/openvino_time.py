"""The embedding of the timestep apart from the UNet, so that it is computed in float32 when the UNet is not."""

from __future__ import annotations

from typing import Any

from catimage_accel.engines.unavailable import EngineUnavailable

__all__ = ["TIME", "time_alone", "without_time"]

TIME = "time_features"


def time_alone(model: Any) -> Any:
    """Of an ``openvino.Model`` with inputs sample and timestep: the part before the first matrix of the timestep."""
    import openvino

    source = _first_matrix(model).get_source_output()
    parameters = [one for one in model.get_parameters() if _names(one) & {"sample", "timestep"}]
    return openvino.Model([source], parameters, "time")


def without_time(model: Any) -> Any:
    """The same model with that part's result as the input ``TIME`` instead of the timestep; changes ``model``."""
    import openvino
    from openvino import opset13

    matrix = _first_matrix(model)
    features = opset13.parameter(matrix.get_partial_shape(), openvino.Type.f32, TIME)
    features.output(0).set_names({TIME})
    matrix.replace_source_output(features.output(0))
    parameters = [one for one in model.get_parameters() if "timestep" not in _names(one)]
    return openvino.Model(model.get_results(), [*parameters, features], "without time")


def _first_matrix(model: Any) -> Any:
    """The input of a multiplication by weights that the timestep goes into."""
    [timestep] = [one for one in model.get_parameters() if "timestep" in _names(one)]
    found, seen, reached = [], set(), [timestep]
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
            f"openvino has no bfloat16 for this UNet: its timestep goes into {len(found)} matrices, not 1; use 'fp32'"
        )
    return found[0]


def _names(parameter: Any) -> set[str]:
    names: set[str] = parameter.output(0).get_names()
    return names
