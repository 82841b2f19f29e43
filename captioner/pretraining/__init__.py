"""Making an encoder: student, teachers, images, probes, and the loop."""
