"""One stage each, as Prefect tasks: inputs in, one core call, outputs stored."""
