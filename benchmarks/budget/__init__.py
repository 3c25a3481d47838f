"""The rule of budgets on simulated machines, with acceptance that was recorded: auto against none and each number."""
