"""Files beside the tensors of a model: config, tokenizer, model card; and quantisation, which is refused."""
