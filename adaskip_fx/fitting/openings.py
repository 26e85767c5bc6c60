"""How documents of many kinds begin, for a model to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: kind -> beginnings. A kind is drawn first: none is rarer for having few of them.
OPENINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stories": (
            *("Once upon a time", "It was", "He", "She had", "There was a", "When", "The old man"),
            *("CHAPTER I.\n\n", "Chapter 1\n", "PREFACE\n\n", '"I', '"', "My dear", "In the year"),
            *("O thou", "ACT I\nSCENE I\n\n", "Dear", "It was a cold evening, and Mr."),
            *("The captain looked at the sea", '"What do you mean, sir?" said'),
        ),
        "facts": (
            *("The", "In 19", "On", "A", "The city of", "Abstract\n", "Introduction\n\n", "By"),
            *("Breaking news:", "Article 1\n", "Section 2.", "Whereas", "Theorem 1.", "Let x"),
            *("Step 1:", "Ingredients:\n", "Review:", "From:", "Subject: Re:"),
        ),
        "talk": (
            *("Q:", "A: Hello", "- Hi", "Question:", "User:", "INTERVIEWER:", "Mom:", "[10:32] <"),
            *("What", "How do I", "Thanks", "I think", "Well,", "You"),
        ),
        "data": (
            *("#", "##", "|", "1.", "-", "*", "{\n", '{"', "[", "<html>", "<?xml", "---\n"),
            *("NAME\n", "0, 1,", "Date,", "key:", "\\documentclass", "\\section{", "$", "Usage:"),
            "Error:",
        ),
        "code": (
            *("def", "import", "class", "from", "#include <", "#define", "/*", "/**\n", "int"),
            *("static", "struct", "function", "const", "package", "public class", "fn", "#!/bin/"),
            *("SELECT", "--", "//"),
        ),
        "languages": (  # several words each: models soon fall back to English
            *("El gobierno de España anunció", "Había una vez un", "La ciudad es conocida por su"),
            *("¿Qué es lo que quieres decir?", "Los archivos se guardan en", "Opciones:\n  La"),
            *("Il était une fois une", "Le gouvernement français a", "Cette commande permet"),
            *("Je ne sais pas pourquoi", "La ville est située dans le", "OPTIONS\n  Affiche les"),
            *("Es war einmal ein", "Die Stadt liegt im Norden von", "Der Befehl gibt die"),
            *("Ich weiß nicht, ob das", "Im Jahr 1990 wurde die", "OPTIONEN\n  Zeigt die Datei"),
            *("C'era una volta un", "La città si trova nel", "Il comando mostra i"),
            *("Era uma vez uma", "O governo do Brasil", "De stad ligt in het noorden van"),
            *("Det var en gång en", "W roku 1990", "中国的", "日本の"),
        ),
    }
)
