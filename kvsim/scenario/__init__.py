"""What a simulation is asked for: its options, tenants, quotas and speculation."""
