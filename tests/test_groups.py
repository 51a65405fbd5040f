"""`param_groups`: every trainable parameter exactly once, treated as its role asks, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_optim import MARS, param_groups


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.c_attn = nn.Linear(8, 24)
        self.mlp = nn.Linear(8, 32, bias=False)
        self.lm_head = nn.Linear(8, 50, bias=False)
        self.lm_head.weight = self.wte.weight


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.experts_up = nn.Parameter(torch.randn(4, 6, 10))
        self.pos_embed = nn.Parameter(torch.randn(1, 7, 6))


class LoraLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 6)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
        self.base.requires_grad_(False)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Flatten()
    )


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


def hugging_face_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def rows_of(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    return {row.names[0]: row for row in param_groups(model, **kwargs).audit.rows}


def group_of(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [g for g in groups if name in [n for n, _ in g["params"]]]
    return found


@pytest.mark.parametrize("mars_type", ["adamw", "lion", "shampoo", "m"])
@pytest.mark.parametrize("build", [TiedLanguageModel, Experts, LoraLinear, conv_net, hugging_face_gpt2, transformer])
def test_groups_are_complete_disjoint_and_accepted(build: Callable[[], nn.Module], mars_type: str) -> None:
    model = build()
    groups = param_groups(model, mars_type, lr=1e-2)
    given = [p for group in groups for _, p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, given)) == sorted(map(id, trainable))
    optimizer = MARS(groups)
    for p in trainable:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in trainable]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(trainable, before, strict=True))


def test_tied_embedding_counts_once_and_is_adamw_under_matrix_types() -> None:
    row = rows_of(TiedLanguageModel(), mars_type="m")["wte.weight"]
    assert row.names == ("wte.weight", "lm_head.weight")
    assert row.group == "adamw"
    assert "tied" in row.why


def test_untied_head_is_recognised_by_the_size_of_the_vocabulary() -> None:
    model = TiedLanguageModel()
    model.lm_head = nn.Linear(8, 50, bias=False)
    model.lm_head, model.projection = None, model.lm_head  # type: ignore[assignment]
    assert "vocabulary" in rows_of(model, mars_type="m")["projection.weight"].why


def test_adamw_groups_are_the_point_gamma_zero_clip_off() -> None:
    groups = param_groups(TiedLanguageModel(), "m", lr=1e-2, lr_1d=3e-3, betas_1d=(0.8, 0.9), weight_decay=0.1)
    embedding = group_of(groups, "wte.weight")
    expected = {"preconditioner": "adamw", "gamma": 0.0, "clip_norm": None, "betas": (0.8, 0.9), "lr": 3e-3}
    assert {key: embedding[key] for key in expected} == expected
    optimizer = MARS(groups)
    vectors = next(g for g in optimizer.param_groups if "norm.weight" in g["param_names"])
    assert vectors["lr_1d_ratio"] == pytest.approx(0.3)
    assert vectors["weight_decay_1d"] == 0.0


def test_adamw_group_moves_like_torch_adamw() -> None:
    model = TiedLanguageModel().double()
    twin = nn.Parameter(model.wte.weight.detach().clone())
    optimizer = MARS(param_groups(model, "m", lr=1e-2, weight_decay=0.1))
    reference = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 10
        assert model.wte.weight.grad is not None
        twin.grad = model.wte.weight.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(model.wte.weight, twin, rtol=0, atol=1e-14)


def test_fused_qkv_is_orthogonalised_third_by_third() -> None:
    model = TiedLanguageModel().double()
    optimizer = MARS(param_groups(model, "shampoo", lr=1.0), polar_method="svd")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = model.c_attn.weight.detach().clone()
    optimizer.step()
    for block in (before - model.c_attn.weight.detach()).split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)


def test_num_heads_splits_into_single_heads() -> None:
    groups = param_groups(TiedLanguageModel(), "m", num_heads=2)
    assert group_of(groups, "c_attn.weight")["matrix_view"] == ("split", 0, (4,) * 6)
    with pytest.raises(ValueError, match=r"num_heads=5 does not split parameter c_attn.weight of shape \(24, 8\)"):
        param_groups(TiedLanguageModel(), "m", num_heads=5)


def test_hugging_face_conv1d_is_split_along_its_columns_and_marked_transposed() -> None:
    groups = param_groups(hugging_face_gpt2(), "shampoo")
    qkv = group_of(groups, "transformer.h.0.attn.c_attn.weight")
    assert qkv["matrix_view"] == ("split", 1, (8, 8, 8))
    assert qkv["matrix_transposed"]
    assert group_of(groups, "transformer.h.0.mlp.c_fc.weight")["matrix_view"] == "flatten"
    assert group_of(groups, "transformer.wpe.weight")["preconditioner"] == "adamw"


def test_transposed_storage_gives_the_transposed_step() -> None:
    stored = nn.Parameter(torch.zeros(4, 12, dtype=torch.float64))
    plain = nn.Parameter(torch.zeros(12, 4, dtype=torch.float64))
    stored.grad = torch.randn(4, 12, dtype=torch.float64)
    plain.grad = stored.grad.T.clone()
    MARS([stored], mars_type="shampoo", matrix_transposed=True).step()
    MARS([plain], mars_type="shampoo").step()
    torch.testing.assert_close(stored.detach().T, plain.detach(), rtol=0, atol=1e-14)


def test_convolutions_are_flattened_and_depthwise_ones_left_to_adamw() -> None:
    rows = rows_of(conv_net(), mars_type="m")
    assert rows["0.weight"].group == "matrix flatten"
    assert rows["3.weight"].group == "matrix flatten"
    assert rows["2.weight"].group == "adamw"
    assert "depthwise" in rows["2.weight"].why


def test_each_expert_is_a_matrix_of_its_own() -> None:
    model = Experts().double()
    groups = param_groups(model, "shampoo", lr=1.0)
    assert group_of(groups, "experts_up")["matrix_view"] == "stack"
    assert "embedding" in {r.names[0]: r.why for r in groups.audit.rows}["pos_embed"]
    optimizer = MARS(groups, polar_method="svd")
    model.experts_up.grad = torch.randn_like(model.experts_up)
    before = model.experts_up.detach().clone()
    optimizer.step()
    moved = before - model.experts_up.detach()
    identity = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(moved @ moved.mT, identity, rtol=0, atol=1e-12)


def test_lora_pairs_are_named_and_an_orphan_is_pointed_out() -> None:
    model = LoraLinear()
    rows = rows_of(model, mars_type="m")
    assert set(rows) == {"lora_A.default.weight", "lora_B.default.weight"}
    assert rows["lora_A.default.weight"].why == "LoRA factor A, with lora_B.default.weight"
    model.lora_B["default"].requires_grad_(False)
    assert "frozen or missing" in rows_of(model, mars_type="m")["lora_A.default.weight"].why


def test_overrides_decide_first_match_and_must_match() -> None:
    overrides = {"mlp*": "adamw", "c_attn.weight": {"matrix_view": ("split", 0, (12, 12)), "weight_decay": 0.5}}
    groups = param_groups(TiedLanguageModel(), "m", overrides=overrides)
    assert group_of(groups, "mlp.weight")["gamma"] == 0.0
    qkv = group_of(groups, "c_attn.weight")
    assert (qkv["matrix_view"], qkv["weight_decay"]) == (("split", 0, (12, 12)), 0.5)
    with pytest.raises(ValueError, match=r"no trainable parameter matches the pattern 'mpl\*'"):
        param_groups(TiedLanguageModel(), "m", overrides={"mpl*": "adamw"})
    with pytest.raises(ValueError, match="must be 'adamw', 'matrix' or a dict"):
        param_groups(TiedLanguageModel(), "m", overrides={"mlp*": "adam"})
    with pytest.raises(ValueError, match="add up to 20"):
        param_groups(TiedLanguageModel(), "m", overrides={"c_attn.weight": {"matrix_view": ("split", 0, (10, 10))}})


def test_adamw_override_works_under_elementwise_types() -> None:
    groups = param_groups(TiedLanguageModel(), "adamw", overrides={"wte*": "adamw"})
    assert group_of(groups, "wte.weight")["gamma"] == 0.0
    assert "gamma" not in group_of(groups, "mlp.weight")


def test_a_matrix_type_without_matrices_is_an_error() -> None:
    with pytest.raises(ValueError, match="has none outside embeddings"):
        param_groups(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "m")
    param_groups(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "adamw")
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), "adamw")


def test_audit_prints_every_parameter_and_the_totals() -> None:
    text = str(param_groups(TiedLanguageModel(), "m").audit)
    assert "wte.weight = lm_head.weight" in text
    assert "50x8" in text
    assert text.splitlines()[-1].startswith("total by group: ")
    assert "frozen tensors: 0" in text


def test_interleaved_qkv_is_not_split_into_thirds() -> None:
    class Bloom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_key_value = nn.Linear(8, 24)

    assert "give num_heads" in rows_of(Bloom(), mars_type="m")["query_key_value.weight"].why
    split = group_of(param_groups(Bloom(), "m", num_heads=2), "query_key_value.weight")
    assert split["matrix_view"] == ("split", 0, (4,) * 6)


def test_gradients_of_split_and_whole_views_differ_only_in_their_blocks() -> None:
    def step(view: Any) -> Tensor:
        p = nn.Parameter(torch.zeros(9, 3, dtype=torch.float64))
        p.grad = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        MARS([p], lr=1.0, mars_type="m", matrix_view=view, polar_method="svd").step()
        return p.detach()

    whole, split = step("flatten"), step(("split", 0, (3, 3, 3)))
    assert not torch.allclose(whole, split)
    torch.testing.assert_close(split[:3] @ split[:3].T, 0.12 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_misspelt_hyperparameter_in_a_group_is_an_error_and_own_keys_are_not() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="unknown hyperparameter 'gama' in a parameter group; did you mean 'gamma'"):
        MARS([{"params": [p], "gama": 0.1}])
    assert MARS([{"params": [p], "initial_lr": 0.1, "layer": 3}]).param_groups[0]["layer"] == 3


def test_a_hidden_matrix_as_long_as_an_embedding_is_still_a_matrix() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(16, 16), nn.Embedding(16, 16)
            self.c_proj = nn.Linear(16, 16)
            self.lm_head = nn.Linear(16, 16)

    rows = rows_of(Model(), mars_type="m")
    assert rows["c_proj.weight"].group == "matrix flatten"
    assert rows["lm_head.weight"].group == "adamw"


def test_norms_biases_and_tables_with_many_dimensions_are_adamw() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm([4, 6, 6])
            self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
            self.down_proj_bias = nn.Parameter(torch.zeros(3, 8))
            self.cls = nn.Parameter(torch.zeros(1, 5, 8))
            self.linear = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 10)

    rows = rows_of(Model(), mars_type="m")
    matrices = [name for name, row in rows.items() if row.group.startswith("matrix")]
    assert matrices == ["linear.weight"]


def test_overrides_of_vectors_take_effect_and_impossible_ones_are_refused() -> None:
    model = TiedLanguageModel()
    groups = param_groups(model, "m", lr_1d=3e-3, overrides={"norm.weight": {"weight_decay": 0.5, "lr": 1e-5}})
    group = group_of(groups, "norm.weight")
    assert (group["weight_decay_1d"], group["lr"], group["lr_1d"]) == (0.5, 1e-5, None)
    for overrides in ({"norm.weight": "matrix"}, {"norm.weight": {"matrix_view": "stack"}}):
        with pytest.raises(ValueError, match=r"norm.weight has shape \(8,\)"):
            param_groups(model, "m", overrides=overrides)
    with pytest.raises(ValueError, match="under mars_type='adamw'"):
        param_groups(model, "adamw", overrides={"mlp.weight": "matrix"})
    with pytest.raises(ValueError, match="cannot change mars_type"):
        param_groups(model, "m", overrides={"mlp.weight": {"mars_type": "adamw"}})
    with pytest.raises(ValueError, match="must be 'adamw', 'matrix' or a dict"):
        param_groups(model, "m", overrides={"mlp.weight": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="num_heads must be None or an integer >= 1; got 0"):
        param_groups(model, "m", num_heads=0)
    with pytest.raises(TypeError, match="got list"):
        param_groups([], "m")  # type: ignore[arg-type]
