"""Layouts of quantized weights in Hugging Face directories, one module each: hf_quantized.py has the table."""
