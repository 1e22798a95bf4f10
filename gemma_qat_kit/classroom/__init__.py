"""A class: exercises that check themselves, files to hand in, a teacher's pool of them, a bundle for offline use."""
