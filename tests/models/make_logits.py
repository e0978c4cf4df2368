"""Writes `logits.npz`: what Hugging Face transformers computes for the models of `_cases.py`.

Run from the root of the repository, where torch and transformers are installed:

    python tests/models/make_logits.py

Stored are transformers' outputs alone (and its version); weights, tokens and masks are drawn again
wherever the comparison runs. Outputs are logits, for BERT the last hidden states. Entries of
padded positions are stored too but mean nothing.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _cases import CASES, draw_tensors, inputs


def reference_model(config: dict[str, Any]):
    """The model of transformers, with the drawn weights."""
    import torch
    import transformers

    settings = copy.deepcopy(config)  # transformers changes nested entries in place
    del settings["model_type"]
    settings |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **settings)
    if config["model_type"] == "bert":
        model = transformers.BertModel(hf_config, add_pooling_layer=False)
    else:
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    state = dict(model.state_dict())
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    state.pop("embeddings.position_ids", None)
    drawn = draw_tensors({name: tuple(tensor.shape) for name, tensor in state.items()})
    tensors = {name: torch.from_numpy(value) for name, value in drawn.items()}
    model.load_state_dict(tensors, strict=False)
    return model.float().eval()


def reference_outputs(config: dict[str, Any]) -> np.ndarray:
    """Logits or hidden states, `(batch, time, features)`, float32."""
    import torch

    given = {name: torch.from_numpy(value).long() for name, value in inputs().items()}
    mask = given["attention_mask"]
    with torch.no_grad():
        if config["model_type"] == "bert":
            out = reference_model(config)(
                given["tokens"], attention_mask=mask, token_type_ids=given["token_types"]
            )
            return out.last_hidden_state.numpy()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = reference_model(config)(
            given["tokens"], attention_mask=mask, position_ids=positions, use_cache=False
        )
        return out.logits.numpy()


def main() -> None:
    """Writes the file beside this script."""
    import transformers

    outputs = {name: reference_outputs(config) for name, config in CASES.items()}
    outputs["transformers_version"] = np.array(transformers.__version__)
    np.savez_compressed(Path(__file__).with_name("logits.npz"), **outputs)


if __name__ == "__main__":
    main()
