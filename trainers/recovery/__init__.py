"""What happens when something breaks? Lease, heartbeat, guard, stopping, rendezvous."""
