"""How documents of many kinds begin, for a model to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: kind -> beginnings. A kind is drawn first: none is rarer for having few of them.
OPENINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stories": (
            *("Once upon a time", "It was", "He", "She had", "There was a", "When", "The old man"),
            *("Chapter 1\n", '"I', '"', "In the year", "The captain looked at the sea"),
            *("Nobody in the village", "I had never", "Rain hammered on the roof as", "Later,"),
            *('"You\'re late," said', "The door was open.", "They walked for hours without"),
            *("Three days after the funeral,", "My grandmother used to", "At midnight the phone"),
        ),
        "old prose": (
            *("CHAPTER I.\n\n", "CHAPTER XVII.\n\nIN WHICH", "PREFACE\n\n", "My dear", "O thou"),
            *("It was a cold evening, and Mr.", '"What do you mean, sir?" said', "Upon my word,"),
            *("It has often been observed that", "The carriage had scarcely stopped before"),
            *("Towards the close of the year 18", "The good lady, who had hitherto", "Not that"),
            *('"Pray, madam," he replied, "', "There lived, in the county of", "Of all the men"),
            *("We had been at sea some weeks, when", "His countenance was grave; for he"),
            *("The soldiers, weary of their long march,", "She rose, and going to the window,"),
        ),
        "verse and plays": (
            *("ACT I\nSCENE I\n\n", "SCENE II. A street.\n\nEnter", "SONNET\n\nWhen", "Shall I"),
            *("The moon is up, the", "O, how I", "(She sits.)\n\nANNA:", "Verse 1\n", "[Chorus]\n"),
            *("Roses are", "And the Lord said unto", "Blessed are", "INT. KITCHEN - DAY\n\n"),
        ),
        "facts": (
            *("The", "In 19", "On", "A", "The city of", "The term", "Early life\n", "History\n\n"),
            *("The river rises in the", "was born on", "The battle of", "The species is found in"),
            *("The album was released in", "According to the census of 20", "is a 1998 film by"),
            *("The treaty, signed in", "The company was founded in", "The Kingdom of", "is a town"),
            *("He played for", "The first season of the series", "Oxygen is", "The President of"),
            *("The song, written by", "In Greek mythology,", "The team finished the season"),
        ),
        "papers": (
            *(
                "Abstract\n",
                "Introduction\n\n",
                "Theorem 1.",
                "Let x",
                "Proof.",
                "In this paper we",
            ),
            *(
                "Methods\n\nPatients were",
                "Table 2:",
                "Keywords:",
                "We show that",
                "[1]",
                "Figure 3.",
            ),
            *("Definition 2.1.", "The results suggest that", "Given a graph G", "Lemma 4 Let $"),
        ),
        "news": (
            *(
                "Breaking news:",
                "By",
                "LONDON (Reuters) -",
                "Police said on Tuesday that",
                "Shares",
            ),
            *(
                "The minister told reporters",
                "Updated 3 hours ago\n",
                "Opinion:",
                "Scientists have",
            ),
            *("The home side won 3-1", "WASHINGTON, March 4 --", "Markets closed higher after"),
        ),
        "law and trade": (
            *(
                "Article 1\n",
                "Section 2.",
                "Whereas",
                "THIS AGREEMENT is made",
                "Terms of Service\n",
            ),
            *(
                "The appellant argues that",
                "(a) The",
                "Invoice No.",
                "Q3 results:",
                "Copyright (c)",
            ),
            *("For sale:", "Job description\n", "We are looking for a", "Privacy Policy\n\n"),
        ),
        "advice": (
            *("Step 1:", "Ingredients:\n", "Review:", "How to", "10 tips for", "Preheat the oven"),
            *(
                "If you want to",
                "The best way to",
                "Symptoms\n",
                "Warning:",
                "FAQ\n\n",
                "Note that",
            ),
            *(
                "This product is",
                "I bought this for",
                "Lesson 3:",
                "Exercise 1.",
                "Before you begin",
            ),
        ),
        "mail": (
            *("Dear", "From:", "Subject: Re:", "Hi all,\n\n", "Dear Sir or Madam,\n", "Thanks"),
            *("> On Monday, you wrote:\n", "To whom it may concern", "PS:", "Sent from my", "Hey,"),
        ),
        "talk": (
            *("Q:", "A: Hello", "- Hi", "Question:", "User:", "INTERVIEWER:", "Mom:", "[10:32] <"),
            *("What", "How do I", "I think", "Well,", "You", "lol", "Posted by", "@", "Reply #3\n"),
            *("Can someone explain why", "Edit: thanks", "Speaker 1:", "Moderator:", "Yes, but"),
        ),
        "data": (
            *("#", "##", "|", "1.", "-", "*", "{\n", '{"', "[", "---\n", "0, 1,", "Date,", "key:"),
            *("id,name,", "| Name |", "12:00:01 INFO", "<item>", "x = ", "0x", "2021-03-14", "$"),
            *("= ", "Total:", "ISBN", "1) ", "(1)", "http://www."),
        ),
        "manuals": (
            *("NAME\n", "Usage:", "SYNOPSIS\n    ", "OPTIONS\n  -", "Error:", "README\n======\n"),
            *("Changelog\n\n", "$ sudo", "Installation\n", "Returns the", "Parameters\n----------"),
            *(
                "This module provides",
                "DESCRIPTION\n       The",
                "Traceback (most recent call last):",
            ),
        ),
        "markup": (
            *("<html>", "<?xml", "<!DOCTYPE html>", "\\documentclass", "\\section{", "<div class="),
            *("== ", "[[", "{{", "body {", "\\begin{equation}", "<p>", "![", ".. "),
        ),
        "code": (
            *("def", "import", "class", "from", "#include <", "#define", "/*", "/**\n", "int"),
            *("static", "struct", "function", "const", "package", "public class", "fn", "#!/bin/"),
            *("SELECT", "--", "//", "extern", "#ifndef", "typedef struct", "var", "let", "module"),
            *("if (", "for i in", "@Override", "using namespace", "CREATE TABLE", "impl"),
        ),
        "Romance languages": (  # several words each: models soon fall back to English
            *("El gobierno de España anunció", "Había una vez un", "La ciudad es conocida por su"),
            *("¿Qué es lo que quieres decir?", "Los archivos se guardan en", "Opciones:\n  La"),
            *("Il était une fois une", "Le gouvernement français a", "Cette commande permet"),
            *("Je ne sais pas pourquoi", "La ville est située dans le", "OPTIONS\n  Affiche les"),
            *("Les fichiers sont enregistrés dans le répertoire", "Elle n'a jamais dit que les"),
            *("C'era una volta un", "La città si trova nel", "Il comando mostra i", "Non so se la"),
            *("Era uma vez uma", "O governo do Brasil", "Os ficheiros são guardados", "Um dia, a"),
            *("Orașul este situat în", "La película fue dirigida por", "L'entreprise a été fondée"),
        ),
        "Germanic languages": (
            *("Es war einmal ein", "Die Stadt liegt im Norden von", "Der Befehl gibt die"),
            *("Ich weiß nicht, ob das", "Im Jahr 1990 wurde die", "OPTIONEN\n  Zeigt die Datei"),
            *("Die Regierung hat beschlossen, dass", "Wenn diese Option gesetzt ist, werden die"),
            *("Der Verein wurde im Jahr", "Er sagte, dass er nicht", "Die Dateien werden in dem"),
            *("De stad ligt in het noorden van", "Het bestand wordt", "Er was eens een", "Ik weet"),
            *("Det var en gång en", "Staden ligger i", "Byen ligger i", "Regjeringen har"),
        ),
        "other languages": (
            *("W roku 1990", "Miasto leży w", "Město leží na", "Ez egy", "Bu bir", "Thành phố"),
            *(
                "Город расположен на",
                "Однажды в",
                "中国的",
                "日本の",
                "서울",
                "Στην πόλη",
                "मैं",
                "في عام",
            ),
            *(
                "Kaupunki sijaitsee",
                "Kota ini terletak di",
                "In principio erat",
                "Gallia est omnis",
            ),
        ),
    }
)
