"""Real PostgreSQL and nats-server, from their wheels, as children of the launcher."""
