"""What the user writes: schema, strict YAML, `extends` and `--set`, error texts. No torch anywhere."""
