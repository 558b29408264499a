"""The configuration of a gsa.c model in transformers. Words are those of train_gsa's flags."""
from transformers import PretrainedConfig


class GSAConfig(PretrainedConfig):
    """n_positions tokens that the model was trained for; gsa_heads: for each layer the numbers of its heads with splats,
    extra ones (extra_heads) counted behind the others; splats of a head; sphere: queries and keys of splats as unit
    vectors; unbounded: names of bounds that are off; output_size: entries of the vocabulary that are predicted, where the
    embedding has one more, [MASK]'s."""

    model_type = "gsa"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "max_position_embeddings": "n_positions"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, vocab_size=1024, n_positions=256, n_layer=2, n_head=2, n_embd=128, attention="hybrid",
                 gsa_heads=None, extra_heads=0, mixer=None, envelope=None, covariance="iso", splats=0, window=0,
                 position="rope", gain="none", rope="fixed", phase="none", forget="none", sphere=True, unbounded=(), objective="lm", output_size=None,
                 use_cache=True, bos_token_id=None, eos_token_id=None, pad_token_id=None, **kwargs):
        self.vocab_size, self.n_positions, self.n_layer, self.n_head, self.n_embd = (vocab_size, n_positions, n_layer,
                                                                                     n_head, n_embd)
        self.attention, self.gsa_heads, self.extra_heads = attention, gsa_heads, extra_heads
        self.mixer, self.envelope, self.covariance, self.splats = mixer, envelope, covariance, splats
        self.window, self.position, self.gain = window, position, gain
        self.rope, self.phase, self.forget = rope, phase, forget
        self.sphere, self.unbounded, self.objective = sphere, list(unbounded), objective
        self.output_size, self.use_cache = output_size or vocab_size, use_cache
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
