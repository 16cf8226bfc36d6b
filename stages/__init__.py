"""The commands behind the CLI: build, train, finetune, evaluate, record, demo. Imports cache and drifting."""
