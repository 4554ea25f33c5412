"""What a run reports while it trains: metrics, speed, goodput, traces, hangs, provenance."""
