import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2, GPT2Config
from mars_lab.training import optimizers
from mars_lab.training.config import OptimizerConfig, TrainConfig
from mars_lab.training.optimizers import Stepper
from mars_optim import MARS, param_groups

MODEL = GPT2Config(num_layers=2, num_heads=2, width=16, context_length=8, vocab_size=40)
TOKENS = torch.randint(0, 40, (30, 4, 9), generator=torch.Generator().manual_seed(1))
EVERY = [
    ("adamw", "approx"),
    ("muon", "approx"),
    ("shampoo", "approx"),
    *((f"mars-{kind}", mode) for kind in ("adamw", "lion", "shampoo", "m") for mode in ("approx", "exact")),
]


def fresh_model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(MODEL)


def loss_of(model: GPT2, step: int) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS[step, :, :-1]).flatten(0, 1), TOKENS[step, :, 1:].flatten())


def backward_of(model: GPT2, step: int) -> Any:
    def backward() -> float:
        loss = loss_of(model, step)
        loss.backward()
        return loss.item()

    return backward


def make(model: GPT2, num_steps: int = 20, **options: Any) -> Stepper:
    return optimizers.build(model, OptimizerConfig(**options), TrainConfig(num_steps=num_steps, schedule="constant"))


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_every_optimizer_learns_one_batch(name: str, mode: str) -> None:
    model = fresh_model()
    stepper = make(model, name=name, mode=mode, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = [stepper.step(backward_of(model, 0), measure_norm=False)[0] for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(40), abs=0.05)
    assert losses[-1] < losses[0] - 0.3
    for n, p in model.named_parameters():
        assert not torch.equal(p, before[n]), f"{n} was left out"
        assert p.grad is None, n


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_audit_names_every_parameter(name: str, mode: str) -> None:
    model = fresh_model()
    audit = make(model, name=name, mode=mode).audit
    for n, _ in model.named_parameters():
        assert n in audit


def test_adamw_is_torchs_with_clipping_and_schedule() -> None:
    ours, theirs = fresh_model(), fresh_model()
    config = OptimizerConfig(name="adamw", lr=0.01, betas=(0.9, 0.95), max_grad_norm=0.5)
    stepper = optimizers.build(ours, config, TrainConfig(num_steps=10, warmup_fraction=0.3, final_lr_ratio=0.1))
    decayed = [p for p in theirs.parameters() if p.dim() == 2]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    rates = []
    for step in range(10):
        rate = 0.01 * ((step + 1) / 3 if step < 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 7)))
        assert stepper.lr == pytest.approx(rate)
        for group in reference.param_groups:
            group["lr"] = stepper.lr
        rates.append(rate)
        loss_of(theirs, step).backward()
        norm = torch.nn.utils.clip_grad_norm_([*decayed, *others], 0.5)  # order matters to the last bit
        reference.step()
        reference.zero_grad()
        _, measured = stepper.step(backward_of(ours, step), measure_norm=True)
        assert measured == norm.item()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert max(rates) == 0.01


def test_exact_mode_is_the_librarys_with_both_gradients_on_the_same_batch() -> None:
    ours, theirs = fresh_model(), fresh_model()
    stepper = make(ours, name="mars-m", mode="exact", lr=0.01, lr_1d=0.005, gamma=0.5)
    groups = param_groups(
        theirs,
        mars_type="m",
        lr=0.01,
        lr_1d=0.005,
        betas=(0.95, 0.99),
        betas_1d=(0.9, 0.95),
        weight_decay=0.1,
        gamma=0.5,
    )
    reference = MARS(groups, mars_type="m", lr=0.01, is_approx=False, max_grad_norm=1.0)
    scale = [(step + 1) / 2 if step < 2 else 1.0 for step in range(20)]
    base = [group["lr"] for group in reference.param_groups]
    for step in range(6):
        for group, lr in zip(reference.param_groups, base, strict=True):
            group["lr"] = lr * scale[step]

        def closure(step: int = step) -> float:
            reference.zero_grad()
            return backward_of(theirs, step)()

        assert stepper.step(backward_of(ours, step), measure_norm=False)[0] == reference.step(closure)
    assert stepper.gradient_evaluations == 2
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_orthogonalises_hidden_matrices_only() -> None:
    model = fresh_model()
    muon, adamw = make(model, name="muon").parts
    hidden = {id(p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == hidden
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert not rest & hidden
    assert rest | hidden == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_a_restored_stepper_continues_bit_for_bit(name: str, mode: str) -> None:
    straight, stopped = fresh_model(), fresh_model()
    straight_stepper, stopped_stepper = (make(m, name=name, mode=mode) for m in (straight, stopped))
    for step in range(4):
        straight_stepper.step(backward_of(straight, step), measure_norm=False)
        stopped_stepper.step(backward_of(stopped, step), measure_norm=False)
    resumed = fresh_model()
    resumed.load_state_dict(stopped.state_dict())
    resumed_stepper = make(resumed, name=name, mode=mode)
    for part, stopped_part in zip(resumed_stepper.parts, stopped_stepper.parts, strict=True):
        part.load_state_dict(stopped_part.state_dict())
    resumed_stepper.load_schedules(stopped_stepper.schedules_state())
    for step in range(4, 8):
        straight_stepper.step(backward_of(straight, step), measure_norm=False)
        resumed_stepper.step(backward_of(resumed, step), measure_norm=False)
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_schedules_reach_every_group(schedule: Any) -> None:
    model = fresh_model()
    train = TrainConfig(num_steps=10, schedule=schedule, warmup_fraction=0.2, final_lr_ratio=0.0)
    stepper = optimizers.build(model, OptimizerConfig(name="muon", lr=0.1, lr_1d=0.01), train)
    seen = []
    for step in range(10):
        seen.append(stepper.lr / 0.1)
        for part, peak in zip(stepper.parts, (0.1, 0.01), strict=True):
            assert all(group["lr"] == pytest.approx(peak * seen[-1]) for group in part.param_groups)
        stepper.step(backward_of(model, step), measure_norm=False)
    stable = [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert seen == pytest.approx([*stable, 1, 0.5] if schedule == "wsd" else [*stable, 1, 1])


def test_how_matrices_travel_is_for_the_types_that_send_them() -> None:
    (mars,) = make(fresh_model(), name="mars-m", exchange_precision="8bit").parts
    assert {group["exchange_precision"] for group in mars.param_groups} == {"8bit"}
    with pytest.raises(InputError, match=r"exchange_precision is for mars-m and mars-shampoo, .* not for 'mars-adamw'"):
        OptimizerConfig(name="mars-adamw", exchange_precision="8bit")


def test_exact_mode_of_a_torch_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match=r"mode=exact is for the MARS types, not for 'muon'"):
        dataclasses.replace(OptimizerConfig(name="muon"), mode="exact")
