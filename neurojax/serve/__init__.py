"""An HTTP server with OpenAI's interface, over any engine and tokenizer."""
