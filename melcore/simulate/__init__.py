"""Simulation: anatomy, motion, coils, noise, and whole exams as a scanner would write them."""
