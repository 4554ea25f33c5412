"""What a run tells while it trains: metrics, speed, goodput, traces, hangs, how to repeat it."""
