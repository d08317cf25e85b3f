"""What happens at each step: sessions, the policy, the state of slots, statistics."""
