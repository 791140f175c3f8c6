"""Shapes of models that several example configs describe, as the fields of a Hugging Face config.json."""

QUICKSTART_STUDENT = {
    'model_type': 'llama',
    'vocab_size': 4096,
    'hidden_size': 160,
    'intermediate_size': 432,
    'num_hidden_layers': 2,
    'num_attention_heads': 5,
    'num_key_value_heads': 5,
    'head_dim': 32,
    'max_position_embeddings': 256,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'tie_word_embeddings': True,
    'bos_token_id': 0,
    'eos_token_id': 0,
    'pad_token_id': 1,
}

QUICKSTART_TEACHER = QUICKSTART_STUDENT | {
    'hidden_size': 320,
    'intermediate_size': 864,
    'num_hidden_layers': 4,
    'num_attention_heads': 10,
}

QWEN3_8B = {
    'model_type': 'qwen3',
    'vocab_size': 151936,
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'num_hidden_layers': 36,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'tie_word_embeddings': False,
}

QWEN3_1B7 = QWEN3_8B | {
    'hidden_size': 2048,
    'intermediate_size': 6144,
    'num_hidden_layers': 28,
    'num_attention_heads': 16,
    'tie_word_embeddings': True,
}
