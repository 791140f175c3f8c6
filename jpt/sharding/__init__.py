"""Where arrays live: mesh, rules, pipeline, hosts."""
