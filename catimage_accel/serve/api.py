"""Requests and answers of the HTTP API: OpenAI's Images API, and what routing adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from catimage_accel.arguments import check_one_of
from catimage_accel.choosing import Policy
from catimage_accel.serve.pictures import OutputFormat
from catimage_accel.serve.service import ServedRoute

__all__ = ["MAX_IMAGES", "MAX_PREVIEWS", "MAX_PROMPT", "GenerateRequest", "ImagesAnswer", "ModelsAnswer", "RouteAnswer",
           "RouteRequest"]  # fmt: skip

MAX_PROMPT = 4000
MAX_IMAGES = 10
MAX_PREVIEWS = 16
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RouteRequest(_Body):
    """What a route is asked for with. At most one of ``tradeoff``, ``budget``, ``min_quality`` and ``candidate``."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")]
    model: Annotated[
        str | None, Field(max_length=200, description="The catalog's name to have the router choose, or a candidate's.")
    ] = None
    tradeoff: Annotated[
        _Number | None, Field(ge=0, description="Quality given up to save the dearest candidate's cost.")
    ] = None
    budget: Annotated[_Number | None, Field(gt=0, description="Most that the image may cost, in the cost unit.")] = None
    min_quality: Annotated[_Number | None, Field(description="Predicted quality to reach at the lowest cost.")] = None
    candidate: Annotated[str | None, Field(max_length=200, description="Who is to draw, without routing.")] = None

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text has lone surrogates; accepted: Unicode text") from None
        return prompt

    @model_validator(mode="after")
    def _one_policy(self) -> RouteRequest:
        check_one_of(
            tradeoff=self.tradeoff, budget=self.budget, min_quality=self.min_quality, candidate=self.candidate
        )  # fmt: skip
        return self

    def policy(self, candidate: str | None) -> Policy:
        """As the pipeline takes it; ``candidate`` is the one named, here or as ``model``."""
        return Policy(self.tradeoff, self.budget, self.min_quality, candidate)


class GenerateRequest(RouteRequest):
    """OpenAI's parameters, and the ones of a route. ``background``, ``moderation``, ``output_compression``,
    ``quality``, ``safety_identifier`` and ``style`` are accepted and change nothing."""

    n: Annotated[int | None, Field(ge=1, le=MAX_IMAGES, description="Images, from seeds one after another.")] = None
    size: Annotated[str | None, Field(max_length=20, description="auto, or WIDTHxHEIGHT in pixels.")] = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat | None = None
    user: Annotated[
        str | None, Field(max_length=200, description="Whom the queue shares the work between; else the address.")
    ] = None
    stream: bool | None = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=MAX_PREVIEWS, description="Previews an image, when streaming; fewer under load.")
    ] = None
    progress: Annotated[bool | None, Field(description="Also stream queue, route and step events.")] = None
    seed: Annotated[int | None, Field(ge=0, le=2**32 - 1, description="Of the first image; drawn if missing.")] = None
    deadline_ms: Annotated[
        _Number | None, Field(gt=0, le=86_400_000, description="Milliseconds until the answer is of no use any more.")
    ] = None
    background: Annotated[str | None, Field(max_length=200)] = None
    moderation: Annotated[str | None, Field(max_length=200)] = None
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    quality: Annotated[str | None, Field(max_length=200)] = None
    safety_identifier: Annotated[str | None, Field(max_length=200)] = None
    style: Annotated[str | None, Field(max_length=200)] = None


@dataclass(frozen=True)
class RouteAnswer(ServedRoute):
    """A route of which nothing is drawn."""

    object: Literal["route"] = "route"


class ImageFields(BaseModel):
    """One image, in the format asked for."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    route: ServedRoute


class ImagesAnswer(BaseModel):
    """OpenAI's answer; ``usage`` is null, for there are no tokens to count."""

    created: int
    data: list[ImageFields]
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    usage: None = None


class CatalogFields(BaseModel):
    """What holds for all candidates. ``tradeoff`` is used unless another one is asked for; at ``max_tradeoff`` nearly
    everything is drawn by the cheapest candidates. ``sizes`` are the sides that some candidate draws."""

    metric: str
    cost_unit: str
    tradeoff: float
    max_tradeoff: float
    routed: bool
    sizes: dict[str, int]


class ModelFields(BaseModel):
    """The catalog, or one of its candidates."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["catimage-accel"] = "catimage-accel"
    catalog: CatalogFields | None = None
    candidate: dict[str, Any] | None = None


class ModelsAnswer(BaseModel):
    """The catalog first, then its candidates."""

    object: Literal["list"] = "list"
    data: list[ModelFields]
