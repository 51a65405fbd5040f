"""The fault drill: each fault is injected into a real training, which must end as if nothing had happened."""
