"""The configuration of a gsa.c model in transformers. Words are those of train_gsa's flags."""
from transformers import PretrainedConfig


class GSAConfig(PretrainedConfig):
    """n_positions: tokens that the model was trained for; gsa_heads: for each layer the numbers of its heads with
    splats, extra ones (extra_heads) counted behind the others; splats: of a head; sphere: queries and keys of splats as
    unit vectors; unbounded: names of bounds that are off; output_size: entries of the vocabulary that are predicted,
    where the embedding has one more, [MASK]'s."""

    model_type = "gsa"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "max_position_embeddings": "n_positions"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, vocab_size=1024, n_positions=256, n_layer=2, n_head=2, n_embd=128, attention="hybrid",
                 gsa_heads=None, extra_heads=0, mixer=None, envelope=None, covariance="iso", splats=None, window=None,
                 position="rope", gain=None, rope=None, phase=None, forget=None, sphere=True, unbounded=(),
                 objective="lm", output_size=None, use_cache=True, bos_token_id=None, eos_token_id=None,
                 pad_token_id=None, **kwargs):
        self.vocab_size, self.n_positions, self.n_layer = vocab_size, n_positions, n_layer
        self.n_head, self.n_embd, self.output_size = n_head, n_embd, output_size or vocab_size
        self.attention, self.extra_heads, self.covariance = attention, extra_heads, covariance
        self.position, self.sphere, self.unbounded = position, sphere, list(unbounded)
        self.objective, self.use_cache = objective, use_cache
        # what is not given follows train_gsa's rules, so that files say all
        splatless, NH = attention == "standard", n_head + extra_heads
        self.mixer = mixer or ("linear" if attention == "extend" else "softmax")
        linear = self.mixer == "linear"
        last = {"standard": 0, "hybrid": (n_head + 1) // 2, "augment": extra_heads}.get(attention, n_head)
        if gsa_heads is None and attention == "hybrid" and not linear and n_layer > 1:  # the first layer
            gsa_heads = [list(range(NH)) if layer == 0 else [] for layer in range(n_layer)]
        self.gsa_heads = [list(range(NH - last, NH))] * n_layer if gsa_heads is None else gsa_heads
        self.window = (64 if attention == "extend" else 0) if window is None else window
        self.envelope = envelope or ("none" if splatless else "raised" if linear else "cosine")
        cosine = self.envelope in ("cosine", "raised")
        self.splats = splats or (0 if splatless else 16 if linear else n_embd // n_head // (2 if cosine else 1))
        rotations = position != "learned" and (attention == "extend" or any(len(h) < NH for h in self.gsa_heads))
        gates = rotations and attention != "extend" and objective == "lm"
        self.gain = gain or ("head" if rotations else "none")
        self.rope = rope or ("learned" if rotations else "fixed")
        self.phase = phase or ("learned" if cosine else "none")
        self.forget = forget or ("half" if gates else "none")
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
