"""How alike the experts of a bank are: by their weights, and by what they put out.

Shapes: N experts, T rows, R rank, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moadapt.experts.base import ExpertBank
from moadapt.experts.lora import LoraBank
from moadapt.experts.malora import MaloraBank


def delta_similarity(bank: ExpertBank) -> Tensor:
    """Cosine of the experts' deltas as vectors, <D_i, D_j> / (|D_i| |D_j|): (N, N) float64, -1 to 1.

    LoRA and MALoRA deltas are never made: see `factor_similarity`. Other kinds' are, all N of them in float32. An
    expert whose delta is zero, as before training, has NaN.

    Raises:
        ConfigError: experts of this kind have no delta of their own.
    """
    with torch.no_grad():
        bank.delta_weight(0)  # the kind says why it has none
        if isinstance(bank, MaloraBank):
            return factor_similarity(bank.malora_P @ bank.shared_A, bank.malora_B)
        if isinstance(bank, LoraBank):
            return factor_similarity(bank.lora_A.expand(bank.num_experts, -1, -1), bank.lora_B)
        deltas = torch.stack([bank.delta_weight(expert).float().flatten() for expert in range(bank.num_experts)])
        return _cosine((deltas @ deltas.T).double())


def factor_similarity(a_NRI: Tensor, b_NRO: Tensor) -> Tensor:
    """Cosine of the deltas B_e^T A_e without making them: (N, N) float64.

    <B_i^T A_i, B_j^T A_j> = tr(A_i^T B_i B_j^T A_j) = sum_rs (A_i A_j^T)_rs (B_i B_j^T)_rs

    Args:
        a_NRI: down-projections.
        b_NRO: up-projections, stored transposed.
    """
    num_experts, rank = a_NRI.shape[:2]
    a_MI, b_MO = a_NRI.double().flatten(0, 1), b_NRO.double().flatten(0, 1)
    products = (a_MI @ a_MI.T) * (b_MO @ b_MO.T)
    return _cosine(products.view(num_experts, rank, num_experts, rank).sum((1, 3)))


def output_similarity(outputs_NTO: Tensor) -> Tensor:
    """Linear CKA of the experts' outputs for the same rows (1905.00414): (N, N) float64, 0 to 1.

    |X_j^T X_i|_F^2 / (|X_i^T X_i|_F |X_j^T X_j|_F) of outputs that are centred over rows. It does not see rotations or
    scales of the outputs. An expert whose output does not vary has NaN.

    Args:
        outputs_NTO: what each expert makes of each row.
    """
    centred_NTO = outputs_NTO.double() - outputs_NTO.double().mean(1, keepdim=True)
    num_experts, rows, features = centred_NTO.shape
    if rows <= features:  # |X_j^T X_i|_F^2 = <X_i X_i^T, X_j X_j^T>
        kernels = (centred_NTO @ centred_NTO.mT).flatten(1)
        return _cosine(kernels @ kernels.T)
    cross = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=outputs_NTO.device)
    for i in range(num_experts):
        for j in range(i + 1):
            cross[i, j] = cross[j, i] = (centred_NTO[i].T @ centred_NTO[j]).square().sum()
    return _cosine(cross)


def _cosine(products_NN: Tensor) -> Tensor:
    norm_N = products_NN.diag().clamp(min=0.0).sqrt()
    return (products_NN / norm_N.outer(norm_N)).clamp(min=-1.0, max=1.0)
