"""Step distillation's target, weights and mixture, and the denoising loss, against their formulas; guidance
distillation against diffusers' guided pipeline."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from catimage_accel.snapfusion.conditioning import FrozenText, with_dropout
from catimage_accel.snapfusion.losses import Denoiser, DenoisingLoss, GuidanceLoss, StepLoss, denoiser_of, taught_step
from catimage_accel.snapfusion.schedule import END, NOISE, V, VelocitySchedule, ddim_step


class Noise:
    """Random latents; caption i is ``"i dogs"``."""

    name = "noise"

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        return torch.randn(size, 4, 8, 8, generator=generator), [f"{index} dogs" for index in range(size)]


@pytest.fixture(scope="module")
def schedule(tiny_sd_folder: Path) -> VelocitySchedule:
    return VelocitySchedule.of_model(tiny_sd_folder)


@pytest.fixture(scope="module")
def text(tiny_sd_folder: Path) -> FrozenText:
    return FrozenText(tiny_sd_folder, torch.device("cpu"), torch.float32)


def bent(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
    """A denoiser that knows nothing, but depends on all that it is given."""
    return torch.sin(sample) * (1 + timestep.view(-1, 1, 1, 1) / 1000) + hidden.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def loss(text: FrozenText, schedule: VelocitySchedule) -> StepLoss:
    return StepLoss(Noise(), text, schedule, bent, 16, 8, batch_size=6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("parts", [2, 4])
def test_one_step_to_the_target_arrives_where_the_teacher_does(loss: StepLoss, parts: int) -> None:
    """From every timestep of the student's grid, the last one included."""
    loss = dataclasses.replace(loss, teacher_steps=8 * parts)
    grid = loss.schedule.grid(8)
    for now, after in pairwise(grid):
        now, after = now.expand(3), after.expand(3)
        noisy = torch.randn(3, 4, 8, 8)
        target = loss.target(lambda sample, at: torch.cos(sample) + at.view(-1, 1, 1, 1) / 500, noisy, now, after)
        here, there = loss.schedule.rates(now), loss.schedule.rates(after)
        noise = (noisy - here[0] * target) / here[1]
        expected, timestep = noisy, now
        for part in range(1, parts + 1):
            following = now + ((after - now) * part / parts).round().long()
            velocity = torch.cos(expected) + timestep.view(-1, 1, 1, 1) / 500
            expected = ddim_step(expected, velocity, loss.schedule.rates(timestep), loss.schedule.rates(following))
            timestep = following
        torch.testing.assert_close(there[0] * target + there[1] * noise, expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_that_knows_the_truth_makes_the_clean_latents_the_target(loss: StepLoss) -> None:
    clean, noise = torch.randn(2, 8, 4, 8, 8)
    now = loss.schedule.grid(8)[:-1]
    after = loss.schedule.grid(8)[1:]
    alpha, sigma = loss.schedule.rates(now)

    def truth(_: Tensor, at: Tensor) -> Tensor:
        rates = loss.schedule.rates(at)
        return rates[0] * noise - rates[1] * clean

    target = loss.target(truth, alpha * clean + sigma * noise, now, after)
    torch.testing.assert_close(target, clean, rtol=1e-3, atol=1e-3)


def test_a_batch_is_weighted_by_the_truncated_signal_to_noise_ratio(loss: StepLoss) -> None:
    """max(alpha^2 / sigma^2, 1) times the squared error of the clean latents, by hand."""
    plain = dataclasses.replace(loss, denoising_weight=0.0, cfg_probability=0.0, caption_dropout=0.0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def student(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        seen.append((sample, timestep, hidden))
        return torch.zeros_like(sample)

    value = plain(student, seeded())
    ((noisy, now, hidden),) = seen
    grid = loss.schedule.grid(8).tolist()
    after = torch.tensor([grid[grid.index(at) + 1] for at in now.tolist()])
    target = plain.target(lambda sample, at: bent(sample, at, hidden), noisy, now, after)
    alpha, sigma = loss.schedule.rates(now)
    errors = (target - alpha * noisy).square() * torch.maximum((alpha / sigma) ** 2, torch.ones_like(alpha))
    torch.testing.assert_close(value, errors.mean())


def test_guided_batches_compare_guided_predictions(loss: StepLoss) -> None:
    """u + w (c - u) over w, by hand: with u = 0 and c = 1 a student's guided v is w itself, a teacher's of zeros 0."""
    guided = dataclasses.replace(loss, cfg_probability=1.0, denoising_weight=0.0, batch_size=64)
    rows: list[int] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def teacher(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        rows.append(len(sample))
        return torch.zeros_like(sample)

    def student(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        seen.append((sample[64:], timestep[64:]))
        assert torch.equal(hidden[:64], loss.text.empty(64))
        return torch.cat([torch.zeros(64, 4, 8, 8), torch.ones(64, 4, 8, 8)])

    def by_hand(scale: float) -> Tensor:
        noisy, now = seen[-1]
        grid = loss.schedule.grid(8).tolist()
        after = torch.tensor([grid[grid.index(at) + 1] for at in now.tolist()])
        target = guided.target(lambda sample, _: torch.zeros_like(sample), noisy, now, after)
        alpha, sigma = loss.schedule.rates(now)
        weight = torch.maximum((alpha / sigma) ** 2, torch.ones_like(alpha))
        return (weight * ((target - (alpha * noisy - sigma * scale)) / scale).square()).mean()

    for scale in (3.0, 5.0):
        value = dataclasses.replace(guided, teacher=teacher, guidance=(scale, scale))(student, seeded())
        torch.testing.assert_close(value, by_hand(scale))
    assert rows == [128] * 4
    between = dataclasses.replace(guided, teacher=teacher, guidance=(3.0, 5.0))(student, seeded())
    assert min(by_hand(3.0), by_hand(5.0)) < between < max(by_hand(3.0), by_hand(5.0))


def test_the_plain_loss_is_added_at_a_share_of_the_distillation_loss(loss: StepLoss) -> None:
    mixed = dataclasses.replace(loss, denoising_weight=0.2, cfg_probability=0.0)
    alone = dataclasses.replace(mixed, denoising_weight=0.0)
    torch.testing.assert_close(mixed(bent, seeded()), 1.2 * alone(bent, seeded()))
    scale = torch.tensor(0.5, requires_grad=True)

    def student(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        return scale * bent(sample, timestep, hidden)

    slopes = []
    for one in (alone, mixed):
        (slope,) = torch.autograd.grad(one(student, seeded()), scale)
        slopes.append(slope)
    assert not torch.isclose(slopes[1], 1.2 * slopes[0])  # the plain loss pulls in a direction of its own


def test_a_batch_depends_on_its_generator_alone_and_the_teacher_learns_nothing(loss: StepLoss) -> None:
    weight = torch.ones((), requires_grad=True)

    def teacher(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        return weight * bent(sample, timestep, hidden)

    taught = dataclasses.replace(loss, teacher=teacher)
    first, again, other = (taught(bent, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad


@pytest.mark.parametrize("kind", [StepLoss, GuidanceLoss])
def test_a_step_without_a_target_is_refused(loss: StepLoss, guidance: GuidanceLoss, kind: type) -> None:
    linspace = dataclasses.replace(loss.schedule, config={**loss.schedule.config, "timestep_spacing": "linspace"})
    with pytest.raises(ValueError, match="stands still, at timestep 0"):
        dataclasses.replace(loss if kind is StepLoss else guidance, schedule=linspace)


@pytest.mark.parametrize("steps", [(8, 8), (12, 8), (4, 8)], ids=["as many", "no multiple", "fewer"])
def test_steps_that_do_not_divide_are_refused(loss: StepLoss, steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"teacher_steps is {steps[0]}; accepted: a multiple of student_steps \(8\)"):
        dataclasses.replace(loss, teacher_steps=steps[0], student_steps=steps[1])


def test_the_denoising_loss_is_the_error_of_v(text: FrozenText, schedule: VelocitySchedule) -> None:
    loss = DenoisingLoss(Noise(), text, schedule, batch_size=10, caption_dropout=0.0)
    seen: list[tuple[Tensor, Tensor]] = []

    def student(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        seen.append((sample, timestep))
        return bent(sample, timestep, hidden)

    value = loss(student, seeded())
    ((noisy, timestep),) = seen
    assert [at // 100 for at in timestep.tolist()] == list(range(10))  # one from each tenth
    generator = seeded()
    clean, captions = Noise().batch(10, generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha, sigma = schedule.rates(timestep)
    torch.testing.assert_close(noisy, alpha * clean + sigma * noise)
    truth = alpha * noise - sigma * clean
    said = bent(noisy, timestep, text.encode(captions))
    torch.testing.assert_close(value, F.mse_loss(said, truth))
    taught = dataclasses.replace(loss, teacher=lambda *given: bent(*given) + 1, teacher_weight=0.25)
    torch.testing.assert_close(taught(bent, seeded()), F.mse_loss(said, 0.75 * truth + 0.25 * (said + 1)))


def test_a_student_of_few_steps_is_asked_about_their_timesteps_alone(
    text: FrozenText, schedule: VelocitySchedule
) -> None:
    asked = []

    def listening(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        asked.extend(timestep.tolist())
        return bent(sample, timestep, hidden)

    DenoisingLoss(Noise(), text, schedule, batch_size=16, student_steps=8)(listening, seeded())
    assert sorted(asked) == sorted(schedule.grid(8)[:-1].tolist() * 2), "each equally often"


def test_captions_are_dropped_at_the_share_asked_for() -> None:
    kept = with_dropout(["dog"] * 4000, 0.1, seeded())
    assert 300 < kept.count("") < 500
    assert with_dropout(["dog"], 0.0, seeded()) == ["dog"]


def test_the_end_is_after_the_last_timestep(schedule: VelocitySchedule) -> None:
    assert schedule.sigma[END] <= schedule.sigma[0]


PROMPTS = ("a dog", "two cats", "a crown on a pink background")


@pytest.fixture(scope="module")
def guidance(text: FrozenText, schedule: VelocitySchedule) -> GuidanceLoss:
    return GuidanceLoss(PROMPTS, text, schedule, bent, 4, 4, 8, (4, 16, 16), 4.5, 0.4)


@pytest.mark.parametrize("predicted", [V, NOISE])
@pytest.mark.parametrize("parts", [1, 2], ids=["step for step", "one for two"])
@pytest.mark.parametrize(
    ("scale", "rescale"), [(4.5, 0.4), (4.5, 0.0), (1.0, 0.4)], ids=["rescaled", "guided", "no guidance"]
)
def test_a_student_that_has_learnt_it_arrives_where_diffusers_guided_pipeline_does(
    guidance: GuidanceLoss, tiny_sd_folder: Path, predicted: str, parts: int, scale: float, rescale: float
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=predicted)
    loss = dataclasses.replace(
        guidance, schedule=dataclasses.replace(guidance.schedule, predicted=predicted),
        teacher=denoiser_of(pipe.unet, torch.float32), teacher_steps=4 * parts, guidance_scale=scale,
        guidance_rescale=rescale,
    )  # fmt: skip
    noise = torch.randn(3, 4, 16, 16, generator=seeded())
    noisy, timestep, target = loss.way(noise, loss.text.encode(list(PROMPTS)))
    assert timestep.view(4, 3).unique(dim=1).squeeze(1).tolist() == loss.schedule.grid(4)[:-1].tolist()
    assert torch.equal(noisy[:3], noise)
    sample = noise
    for (now, after), velocity in zip(pairwise(loss.schedule.grid(4)), target.split(3), strict=True):
        sample = ddim_step(sample, velocity, *(loss.schedule.rates(at.view(1)) for at in (now, after)))
    expected = pipe(
        list(PROMPTS), latents=noise, num_inference_steps=4 * parts, guidance_scale=scale, guidance_rescale=rescale,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(sample, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [4, 6], ids=["steps that divide", "steps that do not"])
def test_a_student_of_another_spacing_arrives_there_too(
    guidance: GuidanceLoss, tiny_sd_folder: Path, tmp_path: Path, steps: int
) -> None:
    """Evenly spread timesteps are not where DDIM's steps lead: it learns the sampler that will draw with it."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace", set_alpha_to_one=True
    )
    pipe.save_pretrained(tmp_path)
    schedule = VelocitySchedule.of_model(tmp_path)
    loss = dataclasses.replace(
        guidance, schedule=schedule, teacher=denoiser_of(pipe.unet, torch.float32), teacher_steps=steps,
        student_steps=steps, batch_size=2 * steps, guidance_rescale=0.0,
    )  # fmt: skip
    noise = torch.randn(3, 4, 16, 16, generator=seeded())
    _, _, target = loss.way(noise, loss.text.encode(list(PROMPTS)))
    sample = noise
    for now, after, velocity in zip(schedule.grid(steps)[:-1], schedule.after(steps), target.split(3), strict=True):
        sample = ddim_step(sample, velocity, *(schedule.rates(at.view(1)) for at in (now, after)))
    expected = pipe(
        list(PROMPTS), latents=noise, num_inference_steps=steps, guidance_scale=4.5, output_type="latent"
    ).images
    torch.testing.assert_close(sample, expected, rtol=1e-3, atol=1e-3)


def test_a_teacher_of_many_steps_is_asked_about_no_timestep_below_0(text: FrozenText, tiny_sd_folder: Path) -> None:
    """From the first timestep to the end there is no room for four steps."""
    schedule = VelocitySchedule.of_model(tiny_sd_folder)
    asked: list[Tensor] = []

    def teacher(sample: Tensor, timestep: Tensor) -> Tensor:
        asked.append(timestep)
        return torch.sin(sample)

    taught_step(schedule, teacher, torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([END]), 4)
    assert torch.cat(asked).tolist() == [1, 1, 0, 0]


def test_a_batch_asks_one_row_of_every_step_and_compares_v(guidance: GuidanceLoss) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def student(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        seen.append((sample, timestep, hidden))
        return torch.zeros_like(sample)

    value = guidance(student, seeded(3))
    ((noisy, timestep, hidden),) = seen
    assert len(noisy) == guidance.batch_size
    assert torch.equal(hidden[:2].repeat(4, 1, 1), hidden)  # two pictures of four steps each
    said, asked, target = guidance.way(noisy[:2], hidden[:2])
    assert torch.equal(said, noisy)
    assert torch.equal(asked, timestep)
    torch.testing.assert_close(value, target.square().mean())
    again, other = guidance(student, seeded(3)), guidance(student, seeded(4))
    assert torch.equal(value, again)
    assert not torch.equal(value, other)


def test_a_student_that_predicts_noise_is_compared_by_its_v(guidance: GuidanceLoss) -> None:
    """Teacher and student say the same as ``bent`` and as zeros do, in noise: the loss is the same."""

    def as_noise(velocity: Denoiser) -> Denoiser:
        def predict(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
            alpha, sigma = guidance.schedule.rates(timestep)
            return alpha * velocity(sample, timestep, hidden) + sigma * sample

        return predict

    noise = dataclasses.replace(guidance, schedule=dataclasses.replace(guidance.schedule, predicted=NOISE))
    noise = dataclasses.replace(noise, teacher=as_noise(bent), guidance_rescale=0.0)
    plain = dataclasses.replace(guidance, guidance_rescale=0.0)
    expected = plain(lambda sample, *_: torch.zeros_like(sample), seeded(5))
    said = noise(as_noise(lambda sample, *_: torch.zeros_like(sample)), seeded(5))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


def test_the_guided_teacher_learns_nothing(guidance: GuidanceLoss) -> None:
    weight = torch.ones((), requires_grad=True)
    taught = dataclasses.replace(guidance, teacher=lambda *given: weight * bent(*given))
    assert not taught(bent, seeded()).requires_grad


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"teacher_steps": 6}, r"teacher_steps is 6; accepted: student_steps \(4\) or a multiple"),
        ({"teacher_steps": 2}, "teacher_steps is 2"),
        ({"batch_size": 6}, r"batch_size is 6; accepted: a multiple of student_steps \(4\)"),
    ],
    ids=["no multiple", "fewer than the student's", "half a picture"],
)
def test_what_does_not_make_whole_pictures_is_refused(guidance: GuidanceLoss, fields: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(guidance, **fields)
