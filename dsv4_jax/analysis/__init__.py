"""What a configuration costs and what a model did: counts, budgets, audits."""
