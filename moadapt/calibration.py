"""What a dense model does at its feed-forward blocks on calibration text, for splits and routers that are fitted to it.

Importance (LLaMA-MoE, 2406.16554), h the input of the down-projection, X_c the real tokens of text cluster c:

    importance[c, f] = mean over t in X_c of |h_tf * dL/dh_tf|,    L = sum over the tokens of -log p(next token)

L is a sum so that a token's gradient does not depend on the batch that it came in. Texts are clustered by balanced
k-means on the mean of their final hidden states, scaled to length 1, so that every cluster has as many texts.

Shapes: B rows, S positions, T real tokens, D hidden size, F neurons, C text clusters, K tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.errors import DataError
from moadapt.observing import Batch, logits, loss, masks, prepared, run, untouched, watching
from moadapt.routing import Stream
from moadapt.splits.base import BlockSample
from moadapt.splits.clustering import RowPoints, balanced_k_means

Progress = Callable[[int, int], None]
_CLUSTER_ROUNDS = 30
_CLUSTER_STARTS = 3


def collect(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    inputs: bool,
    gradients: bool = False,
    down_modules: Mapping[str, nn.Module] | None = None,
    streams: Mapping[str, Stream] | None = None,
    num_clusters: int = 1,
    max_tokens: int = 16384,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, BlockSample]:
    """Run the dense model over calibration text and record what its blocks see.

    The model is in evaluation mode meanwhile; its modes, `requires_grad` flags, gradients and hooks are afterwards what
    they were, also after an error. Kept are at most blocks x max_tokens x D fp32 numbers on the CPU; call it for a few
    blocks at a time if that is too much.

    Args:
        model: a causal or encoder-decoder language model, as transformers makes it.
        blocks: by name, the modules whose first input is the block's input, (B, S, D) or (B S, D).
        batches: arguments of the model by name: `input_ids`, and `attention_mask` where there is padding, on either
            side; `labels` say which tokens the loss counts (-100: not this one), without them all real tokens do.
        inputs: record the blocks' inputs at real tokens: all, or `max_tokens` of them drawn uniformly.
        gradients: measure the importance of the neurons. This takes a second pass over the batches.
        down_modules: by the blocks' names, their down-projections; for `gradients`.
        streams: by the blocks' names, whose tokens a block sees in an encoder-decoder model; `decoder` where missing.
        num_clusters: C; for `gradients`.
        max_tokens: K, the most tokens whose inputs are kept.
        seed: seed of the draw and of the clustering.
        progress: called after every batch with the numbers of batches done and to do, both passes counted.

    Returns:
        By the blocks' names, `inputs_TD` and `importance_CF` as asked for. Which tokens are kept is the same for all
        blocks of one stream, and does not depend on padding or on how texts are batched.

    Raises:
        DataError: there is no real token, or there are fewer texts than clusters.
    """
    downs = {name: (down_modules or {})[name] for name in blocks} if gradients else {}
    of_stream: dict[str, Stream] = {name: (streams or {}).get(name, "decoder") for name in blocks}
    first_pass = inputs or (gradients and num_clusters > 1)
    given = [prepared(model, batch) for batch in batches]
    recorder, clusterer = _InputRecorder(max_tokens, seed), _TextClusterer(num_clusters, seed)
    importance = _Importance(num_clusters, of_stream)
    todo, done = len(given) * (first_pass + gradients), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, todo)

    with untouched(model):
        for batch in given if first_pass else []:
            masks_BS = masks(model, batch)
            with ExitStack() as stack, torch.no_grad():
                if inputs:
                    recorder.begin(masks_BS)
                    for name, module in blocks.items():
                        stack.enter_context(watching(module, recorder.hook(name, of_stream[name])))
                if gradients and num_clusters > 1:
                    head = model.get_output_embeddings()
                    stack.enter_context(watching(head, clusterer.hook(masks_BS["decoder"])))
                    logits(model, batch)  # the head must see all positions
                else:
                    run(model, batch)
            step()
        if gradients:
            clusters_B = clusterer.result(sum(len(batch["input_ids"]) for batch in given))
            for batch, rows_B in zip(given, torch.split(clusters_B, [len(b["input_ids"]) for b in given]), strict=True):
                importance.add(model, batch, rows_B, downs)
                step()
    return {
        name: BlockSample(recorder.result(name) if inputs else None, importance.result(name) if gradients else None)
        for name in blocks
    }


# -- inputs -----------------------------------------------------------------------------------------------------


class _Draw:
    """A uniform draw of K tokens from a stream of unknown length: every token gets a random key, the smallest stay.

    `tokens_K` says which token of the stream is in each of the K slots, or -1 for none.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.count, self.seen = size, 0, 0
        self.keys_K = torch.full((size,), torch.inf, dtype=torch.float64)
        self.tokens_K = torch.full((size,), -1, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)

    def place(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Which of the next tokens are kept, and the slots that they take: int64, equally many."""
        keys_T = torch.rand(num_tokens, dtype=torch.float64, generator=self.generator)
        merged = torch.cat([self.keys_K, keys_T])
        stay = torch.zeros(len(merged), dtype=torch.bool)
        stay[merged.argsort(stable=True)[: self.size]] = True
        newcomers = stay[self.size :].nonzero()[:, 0]
        slots = (~stay[: self.size]).nonzero()[:, 0]  # free ones have infinite keys
        self.keys_K[slots], self.tokens_K[slots] = keys_T[newcomers], self.seen + newcomers
        self.seen += num_tokens
        self.count = min(self.size, self.seen)
        return newcomers, slots


class _InputRecorder:
    """Inputs of the blocks at the tokens that one draw per stream keeps."""

    def __init__(self, max_tokens: int, seed: int) -> None:
        self.max_tokens, self.seed = max_tokens, seed
        self.draws: dict[Stream, _Draw] = {}
        self.now: dict[Stream, tuple[Tensor, Tensor, Tensor]] = {}
        self.kept: dict[str, tuple[Tensor, _Draw]] = {}

    def begin(self, masks: Mapping[Stream, Tensor]) -> None:
        """A new batch: draw from its real tokens."""
        for stream, mask_BS in masks.items():
            draw = self.draws.setdefault(stream, _Draw(self.max_tokens, self.seed))
            mask_T = mask_BS.flatten()
            self.now[stream] = (mask_T, *draw.place(int(mask_T.sum())))

    def hook(self, name: str, stream: Stream) -> Callable[[Tensor], None]:
        """What to do with the input of a block."""

        def see(x: Tensor) -> None:
            mask_T, tokens, slots = self.now[stream]
            x_TD = x.detach().reshape(-1, x.shape[-1])
            if name not in self.kept:
                self.kept[name] = (torch.empty(self.max_tokens, x.shape[-1]), self.draws[stream])
            rows_K = mask_T.nonzero()[:, 0].cpu()[tokens]
            self.kept[name][0][slots] = x_TD[rows_K.to(x.device)].float().cpu()

        return see

    def result(self, name: str) -> Tensor:
        """(T, D), T at most K, in the order of the texts."""
        _all_ran([name], {key: None for key, (_, draw) in self.kept.items() if draw.count})
        buffer, draw = self.kept[name]
        order_K = draw.tokens_K.argsort()
        return buffer[order_K[self.max_tokens - draw.count :]]  # behind the free slots, whose token is -1


# -- importance -------------------------------------------------------------------------------------------------


class _TextClusterer:
    """Clusters of texts by the mean of their final hidden states."""

    def __init__(self, num_clusters: int, seed: int) -> None:
        self.num_clusters, self.seed = num_clusters, seed
        self.features: list[Tensor] = []

    def hook(self, mask_BS: Tensor) -> Callable[[Tensor], None]:
        """What to do with the final hidden states of a batch."""

        def see(state_BSD: Tensor) -> None:
            mask_BS1 = mask_BS.unsqueeze(-1).to(state_BSD.device)
            sum_BD = state_BSD.float().masked_fill(~mask_BS1, 0.0).sum(1)
            self.features.append((sum_BD / mask_BS1.sum(1).clamp(min=1)).cpu())

        return see

    def result(self, num_texts: int) -> Tensor:
        """The cluster of every text: int64."""
        if num_texts < self.num_clusters:
            raise DataError(
                f"calibration: {num_texts} texts for {self.num_clusters} text clusters, one per routed expert; give "
                "more text, or fewer experts"
            )
        if self.num_clusters == 1:
            return torch.zeros(num_texts, dtype=torch.int64)
        least, larger = divmod(num_texts, self.num_clusters)
        return balanced_k_means(
            RowPoints(torch.cat(self.features), normalize=True),
            [least + (cluster < larger) for cluster in range(self.num_clusters)],
            iterations=_CLUSTER_ROUNDS,
            restarts=_CLUSTER_STARTS,
            seed=self.seed,
        )


class _Importance:
    """Sums of |h * dL/dh| by text cluster, and the tokens that they are over."""

    def __init__(self, num_clusters: int, streams: Mapping[str, Stream]) -> None:
        self.num_clusters, self.streams = num_clusters, streams
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[Stream, Tensor] = {}

    def add(self, model: PreTrainedModel, batch: Batch, clusters_B: Tensor, downs: Mapping[str, nn.Module]) -> None:
        """One forward and backward pass. Only activations get gradients."""
        masks_BS = masks(model, batch)
        hidden: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name, module in downs.items():
                stack.enter_context(watching(module, _tracker(hidden, name)))
            total = loss(model, batch, masks_BS)
            _all_ran(downs, hidden)
            gradients = torch.autograd.grad(total, list(hidden.values()))
        for stream, mask_BS in masks_BS.items():
            count_C = self.counts.setdefault(stream, torch.zeros(self.num_clusters))
            count_C.index_add_(0, clusters_B, mask_BS.sum(1).float().cpu())
        for (name, h), gradient in zip(hidden.items(), gradients, strict=True):
            mask_BS = masks_BS[self.streams[name]]
            product_TF = (h.detach().float() * gradient.float()).abs().reshape(-1, h.shape[-1])
            product_TF = product_TF.masked_fill(~mask_BS.reshape(-1, 1).to(h.device), 0.0)
            per_text_BF = product_TF.view(len(clusters_B), -1, h.shape[-1]).sum(1).cpu()
            sum_CF = self.sums.setdefault(name, torch.zeros(self.num_clusters, h.shape[-1]))
            sum_CF.index_add_(0, clusters_B, per_text_BF)

    def result(self, name: str) -> Tensor:
        """(C, F), by the module's equation."""
        _all_ran([name], self.sums)
        return self.sums[name] / self.counts[self.streams[name]].clamp(min=1.0).unsqueeze(1)


def _all_ran(names: Iterable[str], seen: Mapping[str, object]) -> None:
    for name in names:
        if name not in seen:
            raise DataError(f"calibration: no token reached {name}; give some text")


def _tracker(hidden: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Keep an input, and make it one that the loss has a gradient for."""

    def see(h: Tensor) -> Tensor:
        hidden[name] = h if h.requires_grad else h.detach().requires_grad_()
        return hidden[name]

    return see
