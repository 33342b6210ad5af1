"""PEFT adapters, read without peft: from ``adapter_config.json`` to the update of every weight."""
