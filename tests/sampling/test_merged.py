"""The weights that vLLM gets: adapters merged, to the same logits; what cannot be merged is refused. Without vLLM."""

import copy
import re
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from xpo.models.loading import tiny_model
from xpo.models.reference import base_model
from xpo.sampling.vllm import merged_config, merged_weights, unmergeable

KINDS: dict[str, dict[str, Any]] = {
    "all layers": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "DoRA of the embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "adapter on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_weights_say_what_the_adapted_model_says(kind: dict[str, Any], tied: bool) -> None:
    """Where embeddings and head were one tensor, they must not be one any more that has an adapter on one side."""
    config = copy.deepcopy(tiny_model().config)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, task_type="CAUSAL_LM", **kind))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model = base_model(adapted)
    assert unmergeable(model) == ""
    merged = AutoModelForCausalLM.from_config(merged_config(model))
    # As vLLM loads: a tied head is the embeddings, whatever is sent as its own.
    sent = dict(merged_weights(model))
    if merged.config.tie_word_embeddings:
        del sent["lm_head.weight"]
    merged.load_state_dict(sent, strict=not merged.config.tie_word_embeddings)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("adapters", "kind"),
    [
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "Linear"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True), "Linear"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[1]), "TrainableTokens"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=[], target_parameters=["q_proj.weight"]), "ParamWrapper"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1]), "Linear"),
    ],
    ids=["IA3", "lora_bias", "trained tokens", "parameters", "aLoRA"],
)
def test_what_cannot_be_merged_is_refused(adapters: PeftConfig, kind: str) -> None:
    model = base_model(get_peft_model(tiny_model(), adapters))
    assert re.match(rf"knows LoRA and DoRA .*, not the {kind}\w* at model\.\S+; use these", unmergeable(model))


def test_two_active_adapters_are_both_merged() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.add_adapter("second", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    model = base_model(adapted)
    for part in model.modules():
        if isinstance(part, LoraLayer):
            part.set_adapter([name for name in ("default", "second") if name in part.lora_A])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = AutoModelForCausalLM.from_config(merged_config(model))
    merged.load_state_dict(dict(merged_weights(model)))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)
