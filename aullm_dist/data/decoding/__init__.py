"""Opens pictures and videos and checks what they are before their content is used."""
