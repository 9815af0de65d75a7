"""`MixtureModel`: a frozen base model with a mixture of adapters, used as peft's `PeftModel` is."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.adapter_tensors import buffers_of, copy_into
from moadapt.adjust import set_num_experts_per_tok, set_router_threshold
from moadapt.checkpointing import check_checkpointing, disable_checkpointing, enable_checkpointing
from moadapt.config import MixtureConfig, parse_mixture_config
from moadapt.errors import AdapterError, ConfigError
from moadapt.experts.base import Role
from moadapt.generation import generating
from moadapt.inject import adapter_roles, inject
from moadapt.merging import fold_into_base
from moadapt.objective import Objective
from moadapt.passes import PassRequest, install_hooks, named_arguments, requesting
from moadapt.routing import IGNORE_INDEX
from moadapt.saving import (
    INDICES,
    WEIGHTS_FILE,
    changed_mixture,
    check_base,
    load_base_model,
    not_in_file,
    read_adapter_config,
    read_tensors,
    save_adapter,
)


def get_mixture_model(model: PreTrainedModel, config: MixtureConfig | dict[str, Any]) -> MixtureModel:
    """Freeze a transformers model and give it a mixture of adapters.

    Args:
        model: any model with linear layers; changed in place (its targeted modules are replaced).
        config: the mixture, as a config or as a mapping of its options.

    Returns:
        The model to train, in the training mode of `model`.

    Raises:
        ConfigError: an invalid config, or one that does not fit the model.
    """
    return MixtureModel(model, parse_mixture_config(config))


class MixtureModel(nn.Module):
    """A base model whose targeted modules carry mixtures of experts. Made by `get_mixture_model`.

    In training, `forward` with `labels` returns the language-model loss plus the auxiliary losses as `loss`, so any
    trainer of transformers models trains it. Attributes that are not found here are looked up in the base model.

    Args:
        model: the base model; changed in place.
        config: the mixture.
        neuron_indices: which neurons form which expert, for experts cut from blocks; None cuts the blocks now.
        is_trainable: with trained experts and a distillation loss, keep the dense block's weights to compare with.

    Attributes:
        base_model: the model itself, with replaced modules.
        mixture_config: the mixture.
        last_losses: the parts of the last loss, detached scalars: `lm`, every auxiliary loss by its kind before its
            coefficient, and `aux`, their weighted sum.
        objective: the auxiliary losses.
        experts_trained: whether the weights of experts cut from blocks are, or were before, trained.
        accepts_loss_kwargs: tells transformers' `Trainer` that `num_items_in_batch` is understood.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        model: PreTrainedModel,
        config: MixtureConfig,
        neuron_indices: Mapping[str, Tensor] | None = None,
        *,
        is_trainable: bool = True,
    ) -> None:
        super().__init__()
        self._checkpointable = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        checkpointing = any(module.gradient_checkpointing for module in self._checkpointable)
        self.mixture_config = config
        self._is_trainable = is_trainable
        self.experts_trained = bool(getattr(config.expert, "trainable", False))
        self.injection = inject(model, config, neuron_indices)
        self._handles = install_hooks(model, keeps=self.decides_by_sequence)
        self.base_model = model
        self.objective = Objective(config.losses)
        self.last_losses: dict[str, Tensor] = {}
        self._adapter = self._find_adapter_parameters()
        self._roles = adapter_roles(self.injection, self._adapter)
        compares = self.objective.wants_reconstruction or self.objective.wants_teacher_logits
        if is_trainable and compares:  # a copy of the experts, which a model that is only used has no need of
            for layer in self.injection.layers.values():
                layer.experts.keep_original()
        self.train(model.training)
        if checkpointing:
            self.activation_checkpointing_enable()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(
        self,
        *args: Any,
        prompt_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass, with the auxiliary losses in `loss`.

        Args:
            *args: passed to the base model.
            prompt_mask: (B, S) bool, True at prompt tokens, for routers that ask for it.
            task_ids: (B,) int64, for routers that ask for them.
            num_items_in_batch: tokens with a label in all micro-batches (and processes) of the optimizer step. Given,
                the loss is this micro-batch's share of the step's token mean: micro-batches then add up, the
                auxiliary losses included.
            **kwargs: passed to the base model.

        Returns:
            The base model's output. With `labels`, `loss` is the language-model loss, in training plus
            `sum(coef * auxiliary loss)`; the attributes `lm_loss`, `aux_loss` and `aux_losses` hold the parts.
        """
        kwargs = named_arguments(self.base_model, args, kwargs)
        labels = kwargs.get("labels")
        as_tuple = kwargs.get("return_dict") is False
        if labels is not None:
            kwargs = {**kwargs, "return_dict": True}
        active = self.injection.switch.enabled
        if self.training and torch.is_grad_enabled():
            check_checkpointing(self._checkpointable)
        wanted = bool(self.objective.losses) and labels is not None and active
        compares = wanted and self.training and self.objective.wants_reconstruction
        request = PassRequest(
            prompt_mask, task_ids, record=wanted, wants_reconstruction=compares, model=self.base_model
        )
        with requesting(request):
            output = self.base_model(**kwargs)
        if labels is None:
            return output
        records = request.context.records if request.context is not None else []
        lm_loss, share = output.loss, None
        if num_items_in_batch is not None:
            count = self.count_items(labels)
            # The mean over no label at all is not a number; its share of the step is zero.
            lm_loss, share = torch.where(count > 0, lm_loss, 0.0), count / num_items_in_batch
        banks = [layer.experts for layer in self.injection.layers.values()]
        aux_losses = self.objective.of_routings(records, banks, self.training) if active else {}
        if active and self.training and self.objective.wants_teacher_logits:
            teacher_BSV = self._teacher_logits(kwargs, labels, PassRequest(prompt_mask, task_ids))
            aligned = bool(self.base_model.config.is_encoder_decoder)
            aux_losses |= self.objective.of_logits(output.logits, teacher_BSV, labels, aligned=aligned)
        aux_loss = self.objective.weighted_sum(aux_losses, lm_loss)
        loss = lm_loss + aux_loss if self.training else lm_loss
        if active and self.training and torch.is_grad_enabled() and not loss.requires_grad:
            self._explain_no_gradient()
        output.loss = loss if share is None else loss * share
        # Plain attributes, not keys: trainers that unpack or gather an output must not meet them.
        for name, value in (("lm_loss", lm_loss.detach()), ("aux_loss", aux_loss), ("aux_losses", aux_losses)):
            object.__setattr__(output, name, value)
        self.last_losses = {"lm": lm_loss.detach(), **self.objective.parts(aux_losses), "aux": aux_loss.detach()}
        return output.to_tuple() if as_tuple else output

    def _explain_no_gradient(self) -> None:
        """Experts that are frozen under gates that are always 1 leave nothing that the loss depends on.

        Raises:
            ConfigError: such gates, or there are trainable tensors and the loss depends on none of them.
        """
        idle = self._is_trainable and not all(site.router.learns_from_task for site in self.injection.routers.values())
        if idle or any(parameter.requires_grad for parameter in self._adapter.values()):
            raise ConfigError(
                "router.combine: nothing that is trained has an influence on the loss: the gates of the "
                f"{self.mixture_config.router.kind} router have no gradient and the experts are frozen. Set "
                "expert.trainable: true or expert.lora, or choose gates with a gradient (combine: softmax_renorm)"
            )

    def count_items(self, labels: Tensor) -> Tensor:
        """How many positions of a micro-batch (B, S) carry a loss: a causal model predicts all but the first."""
        predicted = labels if self.base_model.config.is_encoder_decoder else labels[..., 1:]
        return (predicted != IGNORE_INDEX).sum()

    @torch.no_grad()
    def _teacher_logits(self, kwargs: dict[str, Any], labels_BS: Tensor, request: PassRequest) -> Tensor:
        """Final logits of the same model with its adapter off, in evaluation mode."""
        inputs = {name: value for name, value in kwargs.items() if name != "labels"}
        if self.base_model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = self.base_model.prepare_decoder_input_ids_from_labels(labels=labels_BS)
        modes = [(module, module.training) for module in self.base_model.modules()]
        self.base_model.eval()
        try:
            with self.disable_adapter(), requesting(request):
                logits_BSV: Tensor = self.base_model(**inputs).logits
        finally:
            for module, training in modes:
                module.training = training
        return logits_BSV

    def generate(
        self,
        *args: Any,
        prompt_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        merge_after_prefill: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate` with the mixture; takes all of its arguments.

        A router of granularity `prompt` decides at the first pass, and again when a conversation goes on with
        `past_key_values`; the decision stays with the cache (`moadapt.generation.decisions_of`).

        Args:
            *args: passed on.
            prompt_mask: (B, S) bool, True at prompt tokens; all tokens of the input when not given. False at earlier
                answers of a conversation gives each of its turns its own decision, as in training. In an
                encoder-decoder everything in the encoder is prompt, and the mask is not read.
            task_ids: (B,) int64, for routers that ask for them.
            merge_after_prefill: once the prompt is read, put the selected experts into temporary weights, so that a
                token costs what it costs the base model. For one prompt, its beams, or prompts routed alike.
            **kwargs: passed on.

        Raises:
            ConfigError: `merge_after_prefill` on a mixture that decides for each token or on a quantised base;
                `prefill_chunk_size` where routers decide by prompt; a prompt mask of another shape than the inputs.
        """
        draft = kwargs.get("assistant_model")
        if isinstance(draft, MixtureModel):
            kwargs = {**kwargs, "assistant_model": draft.base_model}
        with generating(self, args, kwargs, prompt_mask, task_ids, merge_after_prefill):
            return self.base_model.generate(*args, **kwargs)

    @property
    def decides_by_sequence(self) -> bool:
        """Whether a router decides for whole sequences, from their prompts or by task."""
        return any(site.granularity != "token" for site in self.injection.routers.values())

    def expert_names(self, router: str) -> list[str]:
        """What the experts of a router are: names of modules with `expert_unit: module`, else their numbers.

        Args:
            router: its name, as in routing records.
        """
        if self.mixture_config.expert_unit == "module":
            ruled = [name for name, layer in self.injection.layers.items() if layer.ruled_by == router]
            return [name.removeprefix(f"{router}.") for name in ruled]
        return [str(number) for number in range(self.injection.routers[router].router.num_experts)]

    # -- the adapter's tensors ------------------------------------------------------------------------------------

    def _find_adapter_parameters(self) -> dict[str, nn.Parameter]:
        own = {id(p) for layer in self.injection.layers.values() for _, p in layer.experts.adapter_parameters()}
        for part in (*self.injection.routers.values(), *(wrapper.copy for wrapper in self.injection.copies.values())):
            own |= {id(parameter) for parameter in part.parameters()}
        return {name: parameter for name, parameter in self.base_model.named_parameters() if id(parameter) in own}

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in `mixture.safetensors`, and parameters of the adapter."""
        yield from self._adapter.items()

    def parameter_role(self, name: str) -> Role:
        """What an adapter parameter is: `router`, `down`, `up`, `shared_down` or `other`."""
        return self._roles[name]

    def adapter_buffers(self) -> dict[str, Tensor]:
        """What the adapter remembers and does not train, by name: index lists of experts, states of losses."""
        return buffers_of(self.base_model, self.injection) | self.objective.states()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Detached tensors of the adapter by name."""
        return {name: parameter.detach() for name, parameter in self._adapter.items()} | self.adapter_buffers()

    @torch.no_grad()
    def load_adapter_state_dict(
        self, tensors: Mapping[str, Tensor], source: str = "the adapter", optional: Container[str] = ()
    ) -> None:
        """Copy the tensors into the adapter.

        Args:
            tensors: parameters and buffers by name.
            source: where they come from, for the error message.
            optional: names of parameters that may be missing and then keep their values.

        Raises:
            AdapterError: a name is missing or left over, or a shape or an index list differs; nothing is changed then.
        """
        copy_into(self._adapter, self.adapter_buffers(), tensors, source, optional)
        self.objective.load_states(tensors)

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapter's tensors only; the frozen base model is not part of what is trained or saved."""
        destination = {} if destination is None else destination
        for name, parameter in self._adapter.items():
            destination[prefix + name] = parameter if keep_vars else parameter.detach()
        destination |= {prefix + name: value for name, value in self.adapter_buffers().items()}
        return destination

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Counterpart of `state_dict`; always strict.

        Raises:
            AdapterError: names or shapes do not fit.
        """
        self.load_adapter_state_dict(dict(state_dict), "the state dict")
        return nn.modules.module._IncompatibleKeys([], [])

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def end_step(self, parts: Mapping[str, float]) -> None:
        """Tell adaptive losses that an optimizer step is done. `MultiTaskTrainer` does; call it in a loop of your own.

        Args:
            parts: means over the step's micro-batches and processes, under the names of `last_losses`.
        """
        self.objective.end_step(parts)

    def set_router_threshold(self, threshold: float) -> None:
        """Give every router another threshold, which is saved with the model: higher keeps fewer experts.

        Raises:
            ConfigError: the routers have none, or the value is outside of its range.
        """
        set_router_threshold(self, threshold)

    def set_num_experts_per_tok(self, number: int) -> None:
        """Let every router keep another number of experts for each token, which is saved with the model.

        Raises:
            ConfigError: the routers keep no fixed number, or there are fewer experts.
        """
        set_num_experts_per_tok(self, number)

    # -- modes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the `with` block the model is the bare base model."""
        with self.injection.switch.off():
            yield

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Activation checkpointing that recomputes with the routing decisions of the first pass.

        Args:
            activation_checkpointing_kwargs: passed to `torch.utils.checkpoint.checkpoint`.
            **kwargs: further arguments of the base model's method, as `every_n_layers`.

        Raises:
            ConfigError: `use_reentrant: true`, which would lose the auxiliary losses' gradients without a word.
        """
        enable_checkpointing(self.base_model, activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        disable_checkpointing(self.base_model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    # -- leaving --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_and_unload(self) -> PreTrainedModel:
        """Fold the mixture into the base weights and return the plain base model.

        Raises:
            AdapterError: a layer's routing depends on its input, so no single weight equals it; or its base weight is
                quantised, or tied to another module's. Nothing is changed then.
        """
        fold_into_base(self.base_model, self.injection)
        return self._leave(merged=True)

    def unload(self) -> PreTrainedModel:
        """Take the mixture out and return the base model as it was; experts that were trained stay as they are now."""
        return self._leave(merged=False)

    def _leave(self, merged: bool) -> PreTrainedModel:
        self.injection.remove(self.base_model, merged)
        for handle in self._handles:
            handle.remove()
        return self.base_model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `mixture_config.json`, `mixture.safetensors` and a model card; see `moadapt.saving.save_adapter`."""
        save_adapter(self, save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | None,
        adapter: str | Path,
        *,
        is_trainable: bool = False,
        changes: Mapping[str, Any] | None = None,
    ) -> MixtureModel:
        """Put a saved adapter onto its base model.

        Args:
            model: the base model; None loads the one that the adapter names (of a converted model: that in the folder).
            adapter: a folder, or the id of a hub repository.
            is_trainable: keep the adapter trainable; otherwise it is frozen and in evaluation mode.
            changes: options of the mixture to change, as other losses, or `{"expert": {"trainable": True}}` for a
                converted model; see `moadapt.saving.changed_mixture`.

        Raises:
            AdapterError: another base model, or missing, left-over or misshapen tensors.
            ConfigError: `changes` that do not fit what was saved.
        """
        before, saved = read_adapter_config(adapter)
        config = changed_mixture(before, changes) if changes else before
        if model is None:
            if not saved.get("name_or_path"):
                raise AdapterError(f"{adapter} does not name its base model; load that yourself and pass it")
            model = load_base_model(saved["name_or_path"])
        check_base(model, saved, adapter)
        tensors = read_tensors(adapter)
        lists = {name.removesuffix(INDICES): tensor for name, tensor in tensors.items() if name.endswith(INDICES)}
        mixture = cls(model, config, lists or None, is_trainable=is_trainable)
        mixture.experts_trained |= bool(saved.get("experts_trained"))
        optional = not_in_file(mixture._adapter, before, saved)
        if changes:  # states of losses that are left out now
            states = mixture.objective.states()
            tensors = {k: tensor for k, tensor in tensors.items() if not k.startswith("losses.") or k in states}
        try:
            mixture.load_adapter_state_dict(tensors, f"{adapter}/{WEIGHTS_FILE}", optional)
        except AdapterError:
            mixture.unload()  # the caller's model is as it was
            raise
        if not is_trainable:
            mixture.requires_grad_(False)
            mixture.eval()
        return mixture
