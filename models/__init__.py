"""Models, tokenizers and losses: torch, einops, numpy and safetensors only, so a bare GPU machine can import them."""
