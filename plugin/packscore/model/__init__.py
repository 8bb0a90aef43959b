"""What a Hugging Face model is: its family, sizes, weights and heads."""
