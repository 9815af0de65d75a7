"""Every split kind: a balanced partition, always the same one, and what each kind's method says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_balanced import hungarian
from torch import Tensor, nn

from moadapt.errors import ConfigError
from moadapt.ffn import PADDING, FeedForward
from moadapt.registry import SPLITS
from moadapt.splits import BlockSample, Sizes, Split
from moadapt.splits.activation_rate import MarkerPoints
from moadapt.splits.activity import markers

D, F, T = 6, 26, 90


def block(gated: bool = True, dtype: torch.dtype = torch.float32, neurons: int = F, seed: int = 0) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    biases = {} if gated else {"up_bias_F": draw(neurons), "down_bias_D": draw(D)}
    gate_FD = draw(neurons, D) if gated else None
    act = nn.SiLU() if gated else nn.ReLU()
    return FeedForward(draw(neurons, D), draw(neurons, D), gate_FD, act, **biases)


def sample(sizes: Sizes, seed: int = 1) -> BlockSample:
    generator = torch.Generator().manual_seed(seed)
    importance_CF = torch.rand(sizes.num_experts, sizes.num_neurons, generator=generator).square()
    return BlockSample(torch.randn(T, D, generator=generator), importance_CF)


def build(options: dict[str, Any]) -> Split:
    return SPLITS.build(SPLITS.parse(options))


def experts_of(indices_NM: Tensor) -> list[list[int]]:
    return [[index for index in row if index != PADDING] for row in indices_NM.tolist()]


KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {"kind": "contiguous"},
    "random": {"kind": "random", "seed": 3},
    "kmeans": {"kind": "kmeans"},
    "kmeans_up_raw": {"kind": "kmeans", "rows": "up", "normalize": False, "restarts": 2, "seed": 1},
    "coactivation": {"kind": "coactivation"},
    "coactivation_projected": {"kind": "coactivation", "dimensions": 16, "profile": "positive", "normalize": False},
    "activation_rate": {"kind": "activation_rate", "markers_per_token": 3},
    "activation_rate_more": {"kind": "activation_rate", "markers_per_token": 3, "iterations": 8},
    "activation_rate_many_marks": {"kind": "activation_rate", "markers_per_token": 99},
    "gradient": {"kind": "gradient"},
}
SIZES = {
    "4 of 26": Sizes(0, 4, F),
    "2 of 26": Sizes(0, 2, F),
    "13 of 26": Sizes(0, 13, F),
    "1+3 of 26": Sizes(1, 3, F),
    "3+2 of 26": Sizes(3, 2, F),
    "2+1 of 26": Sizes(2, 1, F),
    "1 of 26": Sizes(0, 1, F),
    "26 of 26": Sizes(0, 26, F),
}


def test_every_kind_is_in_the_table_of_this_file() -> None:
    assert {options["kind"] for options in KINDS.values()} | {"file"} == set(SPLITS.names())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("gated", [True, False])
def test_balanced_partition_and_the_same_one_again(name: str, sizes: Sizes, gated: bool) -> None:
    split, ffn = build(KINDS[name]), block(gated)
    assert not split.needs_gradients() or name == "gradient"
    indices = split.assign(ffn, sizes, sample(sizes), "mlp")
    assert indices.dtype == torch.int64
    assert indices.shape == (sizes.num_shared + sizes.num_experts, sizes.width)
    assert sorted(index for index in indices.flatten().tolist() if index != PADDING) == list(range(F))
    for row, expert in zip(indices.tolist(), experts_of(indices), strict=True):
        assert row == sorted(expert) + [PADDING] * (sizes.width - len(expert))
        assert sizes.width - len(expert) <= 1
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(indices, build(KINDS[name]).assign(ffn, sizes, sample(sizes), "mlp"))


@pytest.mark.parametrize("name", KINDS)
def test_low_precision_weights(name: str) -> None:
    sizes = Sizes(1, 3, F)
    indices = build(KINDS[name]).assign(block(dtype=torch.bfloat16), sizes, sample(sizes), "mlp")
    assert sorted(index for index in indices.flatten().tolist() if index != PADDING) == list(range(F))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_shared", [0, 1])
def test_what_is_needed_is_what_is_read(name: str, num_shared: int) -> None:
    split, sizes = build(KINDS[name]), Sizes(num_shared, 3, F)
    if split.needs_inputs(num_shared) or split.needs_gradients():
        with pytest.raises(ConfigError, match=r"layers\.1\.mlp.*calibration\.path"):
            split.assign(block(), sizes, BlockSample(), "layers.1.mlp")
    else:
        split.assign(block(), sizes, BlockSample(), "layers.1.mlp")


@pytest.mark.parametrize("name", ["random", "kmeans", "coactivation", "coactivation_projected"])
def test_the_seed_matters(name: str) -> None:
    sizes = Sizes(0, 4, 60)
    made = {
        str(build({**KINDS[name], "seed": s, "iterations": 1}).assign(block(neurons=60), sizes, sample(sizes), ""))
        if name != "random"
        else str(build({"kind": "random", "seed": s}).assign(block(neurons=60), sizes, sample(sizes), ""))
        for s in range(5)
    }
    assert len(made) > 1


def test_contiguous_is_equal_slices_and_the_first_hold_what_is_left_over() -> None:
    sizes = Sizes(1, 3, 10)
    indices = build({"kind": "contiguous"}).assign(block(neurons=10), sizes, BlockSample(), "mlp")
    assert indices.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, PADDING], [8, 9, PADDING]]


# -- clusters -----------------------------------------------------------------------------------------------------


def shuffled_groups(groups: int, size: int, seed: int = 4) -> tuple[Tensor, list[list[int]]]:
    """The hidden group of each of groups x size neurons, and the groups ordered by their smallest neuron."""
    label_F = torch.arange(groups).repeat_interleave(size)
    label_F = label_F[torch.randperm(len(label_F), generator=torch.Generator().manual_seed(seed))]
    members = [(label_F == group).nonzero().flatten().tolist() for group in range(groups)]
    return label_F, sorted(members)


@pytest.mark.parametrize("rows", ["gate", "up"])
def test_kmeans_recovers_permuted_blocks_of_similar_rows(rows: str) -> None:
    label_F, members = shuffled_groups(4, 15)
    centers = torch.randn(4, D) * 2
    ffn = block(neurons=60)
    planted_FD = (centers[label_F] + 0.2 * torch.randn(60, D)) * (0.5 + torch.rand(60, 1))
    fields = {"gate_FD": planted_FD, "up_FD": torch.randn(60, D)}
    if rows == "up":
        fields = {"gate_FD": torch.randn(60, D), "up_FD": planted_FD}
    ffn = FeedForward(down_FD=ffn.down_FD, act=ffn.act, **fields)
    indices = build({"kind": "kmeans", "rows": rows}).assign(ffn, Sizes(0, 4, 60), BlockSample(), "mlp")
    assert experts_of(indices) == members


@pytest.mark.parametrize("options", [{}, {"dimensions": 40}, {"normalize": False}, {"profile": "positive"}], ids=str)
def test_coactivation_recovers_neurons_that_fire_together(options: dict[str, Any]) -> None:
    """Rows of one group are different, but each of them reads the one direction that its group's tokens have."""
    label_F, members = shuffled_groups(4, 15)
    up_FD = torch.randn(60, 12) * 0.3
    up_FD[torch.arange(60), label_F] += 3.0
    inputs_TD = torch.randn(400, 12) * 0.3
    inputs_TD[torch.arange(400), torch.arange(400) % 4] += 1.5
    ffn = FeedForward(up_FD, torch.randn(60, 12), None, nn.ReLU(), up_bias_F=torch.full((60,), -1.0))
    split = build({"kind": "coactivation", **options})
    assert experts_of(split.assign(ffn, Sizes(0, 4, 60), BlockSample(inputs_TD), "mlp")) == members


def test_coactivation_maximises_the_weight_of_the_graph_inside_the_parts() -> None:
    """The identity of the module's docstring, with sum_t p_ti p_tj computed pair by pair."""
    ffn, inputs_TD = block(gated=False, neurons=24), torch.randn(50, D)
    h_TF = torch.relu(inputs_TD.double() @ ffn.up_FD.double().T + ffn.up_bias_F)
    inside = []
    for iterations in (1, 30):
        options = {"kind": "coactivation", "normalize": False, "iterations": iterations, "seed": 2}
        experts = experts_of(build(options).assign(ffn, Sizes(0, 4, 24), BlockSample(inputs_TD), "mlp"))
        inside.append(sum((h_TF[:, i] * h_TF[:, j]).sum().item() for part in experts for i in part for j in part))
        spread = sum((h_TF[:, i] - h_TF[:, part].mean(1)).square().sum().item() for part in experts for i in part)
        assert inside[-1] == pytest.approx(6 * (h_TF.square().sum().item() - spread))
    assert inside[1] >= inside[0]


def test_projected_profiles_keep_distances() -> None:
    """Johnson-Lindenstrauss: at R = 2000 squared distances are right within about sqrt(2 / R) = 3 % (standard dev.)."""
    ffn, inputs_TD = block(neurons=20), torch.randn(2500, D)
    exact = build({"kind": "coactivation", "dimensions": 9999}).profiles(ffn, inputs_TD)
    projected = build({"kind": "coactivation", "dimensions": 2000}).profiles(ffn, inputs_TD)
    assert exact.shape == (20, 2500)
    assert projected.shape == (20, 2000)
    h_TF = (nn.functional.silu(inputs_TD @ ffn.gate_FD.T) * (inputs_TD @ ffn.up_FD.T)).abs().double()
    h_TF = h_TF / h_TF.square().sum(0).sqrt()
    wanted = (h_TF[:, :, None] - h_TF[:, None]).square().sum(0)
    got = torch.cdist(exact.double(), exact.double()).square()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    pairs = torch.triu(torch.ones(20, 20), 1).bool()
    ratio = torch.cdist(projected.double(), projected.double()).square()[pairs] / wanted[pairs]
    assert (ratio - 1).abs().max() < 0.16


# -- activation rate ----------------------------------------------------------------------------------------------


def naive_markers(ffn: FeedForward, inputs_TD: Tensor, per_token: int) -> list[set[int]]:
    """CMoE's markers: the per_token neurons with the largest |h| of every token, one neuron at a time, in float64."""
    marked = []
    for x in inputs_TD.double():
        size = []
        for neuron in range(ffn.num_neurons):
            up = (ffn.up_FD[neuron].double() * x).sum()
            if ffn.gate_FD is None:
                assert ffn.up_bias_F is not None
                h = max((up + ffn.up_bias_F[neuron].double()).item(), 0.0)
            else:
                gate = (ffn.gate_FD[neuron].double() * x).sum()
                h = (gate * torch.sigmoid(gate) * up).item()
            size.append(abs(h))
        marked.append(set(sorted(range(ffn.num_neurons), key=lambda neuron: -size[neuron])[:per_token]))
    return marked


def test_activation_rate_against_the_papers_steps() -> None:
    """Markers, rates, shared experts and seeds as CMoE has them; the square assignment problem has the same optimum."""
    ffn, sizes = block(), Sizes(1, 3, 24)
    ffn = ffn.take(torch.arange(24))
    inputs_TD = torch.randn(T, D)
    marked = naive_markers(ffn, inputs_TD, 4)
    assert [set(row) for row in markers(ffn, inputs_TD, 4).tolist()] == marked
    count = [sum(neuron in token for token in marked) for neuron in range(24)]
    order = sorted(range(24), key=lambda neuron: (-count[neuron], neuron))
    split = build({"kind": "activation_rate", "markers_per_token": 4})
    shared, *routed = experts_of(split.assign(ffn, sizes, BlockSample(inputs_TD), "mlp"))
    assert shared == sorted(order[:6])
    columns = [[float(neuron in token) for token in marked] for neuron in range(24)]

    def distance(neuron: int, seed: int) -> float:
        return sum(abs(one - other) for one, other in zip(columns[neuron], columns[seed], strict=True))

    seeds = order[6:9]
    cost = sum(distance(neuron, seed) for expert, seed in zip(routed, seeds, strict=True) for neuron in expert)
    square = [[distance(neuron, seed) for seed in seeds for _ in range(6)] for neuron in order[6:]]
    assert cost == hungarian(square)


def test_marker_points_are_binary_columns() -> None:
    """Distances and means of the lists of marks equal those of the (T, F) matrix of zeros and ones."""
    generator = torch.Generator().manual_seed(7)
    marked_TK = torch.stack([torch.randperm(30, generator=generator)[:5] for _ in range(1100)])
    dense_TF = torch.zeros(1100, 30).scatter_(1, marked_TK, 1.0)
    chosen_G, labels_G = torch.arange(2, 30, 2), torch.arange(14) % 4
    points = MarkerPoints(marked_TK, chosen_G, 30)
    columns_GT = dense_TF[:, chosen_G].T
    torch.testing.assert_close(points.rows(torch.tensor([3, 0])), columns_GT[[3, 0]])
    centroids = torch.rand(4, 1100, generator=generator)
    wanted = (columns_GT[:, None] - centroids).square().sum(-1)
    torch.testing.assert_close(points.distances(centroids), wanted, rtol=1e-4, atol=1e-3)
    means = torch.stack([columns_GT[labels_G == cluster].mean(0) for cluster in range(4)])
    torch.testing.assert_close(points.means(labels_G, 4), means)


@pytest.mark.parametrize("kind", ["kmeans", "coactivation", "activation_rate"])
def test_always_active_neurons_are_shared(kind: str) -> None:
    ffn = block(gated=False, neurons=40)
    always = [5, 11, 17, 23, 29]
    assert ffn.up_bias_F is not None
    ffn.up_bias_F[always] += 50.0
    inputs = BlockSample(torch.randn(T, D))
    indices = build({"kind": kind}).assign(ffn, Sizes(1, 7, 40), inputs, "mlp")
    assert experts_of(indices)[0] == always


# -- gradient -----------------------------------------------------------------------------------------------------


def test_gradient_gives_every_expert_what_its_texts_need() -> None:
    label_F, _ = shuffled_groups(3, 10)
    importance = 0.01 * torch.rand(3, 30)
    importance[label_F, torch.arange(30)] += 1.0
    importance *= torch.tensor([[1000.0], [1.0], [0.001]])  # large gradients in one cluster of texts
    indices = build({"kind": "gradient"}).assign(block(neurons=30), Sizes(0, 3, 30), BlockSample(None, importance), "")
    assert experts_of(indices) == [(label_F == expert).nonzero().flatten().tolist() for expert in range(3)]


@pytest.mark.parametrize("num_shared", [0, 1])
def test_gradient_takes_no_side_for_texts_with_large_gradients(num_shared: int) -> None:
    sizes = Sizes(num_shared, 3, 24)
    importance = torch.rand(3, 24)
    split = build({"kind": "gradient"})
    plain = split.assign(block(neurons=24), sizes, BlockSample(None, importance), "")
    scaled = split.assign(
        block(neurons=24), sizes, BlockSample(None, importance * torch.tensor([[64.0], [1], [8]])), ""
    )
    assert torch.equal(plain, scaled)


def test_gradient_maximises_the_shares_of_importance() -> None:
    importance = torch.rand(2, 8, dtype=torch.float64).square()
    share = importance / importance.sum(1, keepdim=True)
    experts = experts_of(
        build({"kind": "gradient"}).assign(block(neurons=8), Sizes(0, 2, 8), BlockSample(None, importance), "")
    )
    parts = itertools.combinations(range(8), 4)
    best = max(parts, key=lambda part: sum(share[0 if f in part else 1, f].item() for f in range(8)))
    assert experts[0] == list(best)


def test_gradient_shares_what_several_clusters_need() -> None:
    importance = 0.01 * torch.rand(3, 16)
    importance[:, [2, 7, 8, 13]] = 0.5  # every cluster needs them
    importance[0, [0, 5]] = 30.0  # one cluster needs them more than anything, and so has the largest sum over clusters
    importance[1, 1] = importance[2, 3] = 5.0
    sizes = Sizes(1, 3, 16)
    experts = experts_of(
        build({"kind": "gradient"}).assign(block(neurons=16), sizes, BlockSample(None, importance), "")
    )
    assert experts[0] == [2, 7, 8, 13]
    assert {0, 5} <= set(experts[1])


def test_gradient_wants_one_text_cluster_per_expert() -> None:
    with pytest.raises(ConfigError, match=r"one text cluster per routed expert of h\.0"):
        build({"kind": "gradient"}).assign(block(), Sizes(0, 4, F), BlockSample(None, torch.rand(3, F)), "h.0")
