"""A gsa.c model in transformers: GPT-2's network, its attention from gsa.py beside this file.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)      # a decoder
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)      # an encoder

FOLDER comes from dev/convert.py MODEL.bin FOLDER --hf; dev/convert.py FOLDER MODEL.bin takes it back, also after
save_pretrained. The classifier is the token embedding."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

from .configuration_gsa import GSAConfig
from .gsa import GaussianSplatAttention, GSACache

# what an output calls its cache: newer versions of transformers have another name
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(C, eps=1e-5), nn.LayerNorm(C, eps=1e-5), MLP(C)
        self.attn = GaussianSplatAttention(
            C, config.n_head, attention=config.attention, gsa_heads=config.gsa_heads and config.gsa_heads[layer],
            extra_heads=config.extra_heads, mixer=config.mixer, envelope=config.envelope, covariance=config.covariance,
            splats=config.splats, window=config.window, position=config.position, gain=config.gain,
            rope=config.rope, phase=config.phase, forget=config.forget,
            causal=config.objective == "lm", sphere=config.sphere, unbounded=config.unbounded, layer_idx=layer,
            layers=config.n_layer)

    def forward(self, x, **kwargs):
        out, weights, cache = self.attn(self.ln_1(x), **kwargs)
        x = x + out
        return x + self.mlp(self.ln_2(x)), weights, cache


class GSAPreTrainedModel(PreTrainedModel):
    config_class = GSAConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # it makes its own: keys and values are not all that it remembers

    @torch.no_grad()
    def _init_weights(self, module):
        if any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            return  # read from a file
        if isinstance(module, GaussianSplatAttention):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(std=0.02)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        if isinstance(module, MLP):  # it writes to the residual stream
            module.c_proj.weight.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))


class GSAModel(GSAPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.position != "rope" else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def _positions(self, x, seen, attention_mask, position_ids):
        """numbers of learned positions, (B or 1, T): padding is not counted"""
        T = x.shape[1]
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + T, device=x.device).unsqueeze(0)
        if seen + T > self.config.n_positions and int(position_ids.max()) >= self.config.n_positions:
            raise ValueError(f"this model has learned positions for {self.config.n_positions} tokens and no others")
        return position_ids[:, -T:]

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, inputs_embeds=None,
                position_ids=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
                **kwargs):
        memory = cache if cache is not None else past_key_values
        if memory is not None and not isinstance(memory, GSACache):
            raise ValueError(f"the cache of this model is a GSACache, not a {type(memory).__name__}; leave it out, and "
                             "the model makes one")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and memory is None and self.config.objective == "lm":
            memory = GSACache()
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if self.wpe is not None:
            seen = 0 if memory is None else memory.get_seq_length()
            x = x + self.wpe(self._positions(x, seen, attention_mask, position_ids))
        if attention_mask is not None and not torch.compiler.is_compiling() and bool((attention_mask > 0).all()):
            attention_mask = None  # nothing is masked: the fast way
        hidden, attentions = (x,), ()
        for block in self.h:
            x, weights, _ = block(x, attention_mask=attention_mask, past_key_values=memory,
                                  output_attentions=bool(output_attentions))
            hidden += (x,)
            attentions += (weights,)
        x = self.ln_f(x)
        out = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden if output_hidden_states else None,
                                      attentions=attentions if output_attentions else None, **{CACHE: memory})
        return out if return_dict is not False else out.to_tuple()


class GSAHead(GSAPreTrainedModel):
    """the network and its classifier"""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = GSAModel(config)
        self.post_init()

    def _logits(self, hidden_states):
        logits = F.linear(hidden_states, self.transformer.wte.weight)
        if self.config.output_size < self.config.vocab_size:
            logits[..., self.config.output_size:] = -math.inf
        return logits


class GSAForCausalLM(GSAHead, GenerationMixin):
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache=None, attention_mask=None,
                                      inputs_embeds=None, use_cache=True, **kwargs):
        memory = cache if cache is not None else past_key_values
        seen = 0 if memory is None else memory.get_seq_length()
        first = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None and not seen else \
            {"input_ids": input_ids[:, seen:] if inputs_embeds is None else input_ids[:, -1:]}
        return first | {CACHE: memory, "attention_mask": attention_mask, "use_cache": use_cache} | {
            name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, labels=None, logits_to_keep=0,
                return_dict=None, **kwargs):
        """labels: as input_ids, moved by one in here; -100 is left out"""
        more = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        out = self.transformer(input_ids, attention_mask, past_key_values, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self._logits(out.last_hidden_state[:, keep]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **more)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states,
                                     attentions=out.attentions, **{CACHE: getattr(out, CACHE)})
        return out if return_dict is not False else out.to_tuple()


class GSAForMaskedLM(GSAHead):
    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None, **kwargs):
        """labels: what the masked tokens were, -100 elsewhere"""
        kwargs.pop("num_items_in_batch", None)
        out = self.transformer(input_ids, attention_mask, use_cache=False, **kwargs)
        logits, loss = self._logits(out.last_hidden_state), None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        out = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)
        return out if return_dict is not False else out.to_tuple()
