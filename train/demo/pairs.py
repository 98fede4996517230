"""Writes `pairs.jsonl`: 360 small preference pairs for a first run, the same bytes each time.

Everyday questions of eight topics. The preferred answer is direct, correct and polite. The other one evades, rambles,
pads or is rude; it may hold the right answer. Which of the two is longer differs from pair to pair.

    python -m train.demo.pairs
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).with_name("pairs.jsonl")

# How the other answer fails. {it} is the question's subject; {answer} the preferred answer.
EVASIVE = (
    "That is hard to say. Some people would tell you one thing about {it} and some another.",
    "I would rather not commit myself on {it}.",
    "It depends. You may want to ask someone else about {it}.",
    "There are many views on {it}, and who is to say which of them is right?",
    "I could look into {it}, but I am not sure that it would help.",
    "Opinions differ.",
)
RAMBLING = (
    "Well, {it}, where do I even begin? It reminds me of something my uncle used to say, but I forget what.",
    "So, thinking about {it}, and I do that a lot, one thing leads to another, and soon it is evening.",
    "Oh, {it}! There was a programme about that once, or about something else, but the music was nice.",
    "Now {it} is a long story, and to tell it properly I would first have to tell you three other stories.",
)
PADDED = (
    "What a fantastic question! I am so thrilled that you asked! {answer}",
    "Great question! As a very helpful assistant I am always delighted to be of help with {it}! Is there more?",
    "Wow, I love this! {answer} Isn't that amazing? Ask me more! I am so excited!",
    "Thank you so very much for this truly wonderful question about {it}, it really made my whole day!",
)
RUDE = (
    "Seriously? Look it up.",
    "Everybody knows that.",
    "Not my problem.",
    "Why would anyone ask about {it}? Do your own work for once.",
    "You should have learned that at school.",
    "Ugh, not again. Figure it out.",
)

CAPITALS = """
France Paris|Spain Madrid|Portugal Lisbon|Italy Rome|Germany Berlin|Austria Vienna|Poland Warsaw|Norway Oslo
Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Iceland Reykjavik|Ireland Dublin|Greece Athens|Hungary Budapest
Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade|Belgium Brussels|Turkey Ankara|Egypt Cairo
Kenya Nairobi|Ethiopia Addis_Ababa|Ghana Accra|Nigeria Abuja|Senegal Dakar|Morocco Rabat|Japan Tokyo|China Beijing
Vietnam Hanoi|Thailand Bangkok|India New_Delhi|Nepal Kathmandu|Mongolia Ulaanbaatar|Australia Canberra
New_Zealand Wellington|Canada Ottawa|Mexico Mexico_City|Cuba Havana|Brazil Brasília|Argentina Buenos_Aires
Chile Santiago|Peru Lima|Colombia Bogotá|Uruguay Montevideo|Ecuador Quito|Paraguay Asunción
"""

# from, to, how many of the second make one of the first
UNITS = (
    ("kilometres", "metres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("metres", "centimetres", 100),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("decades", "years", 10),
)

FACTS = """
How many legs does a spider have?|spiders|A spider has eight legs.
What is the largest planet in the solar system?|planets|Jupiter is the largest planet in the solar system.
Which planet is closest to the sun?|the planets|Mercury is the planet closest to the sun.
At what temperature does water boil at sea level?|boiling water|Water boils at 100 °C (212 °F) at sea level.
At what temperature does water freeze?|freezing water|Water freezes at 0 °C, which is 32 °F.
Who wrote Romeo and Juliet?|Romeo and Juliet|William Shakespeare wrote Romeo and Juliet.
Who painted the Mona Lisa?|the Mona Lisa|Leonardo da Vinci painted the Mona Lisa.
How many days are there in a leap year?|leap years|A leap year has 366 days; the extra one is 29 February.
What gas do plants take in from the air to grow?|plants|Plants take in carbon dioxide and give off oxygen.
What is the chemical symbol for gold?|gold|The symbol for gold is Au, from the Latin word aurum.
What is the chemical formula of table salt?|salt|Table salt is sodium chloride, NaCl.
How many continents are there?|the continents|By the usual count there are seven continents.
Which ocean is the largest?|the oceans|The Pacific Ocean is the largest.
What is the highest mountain above sea level?|mountains|Mount Everest, at about 8,849 metres.
What do bees make from nectar?|bees|Bees make honey from nectar.
What is the fastest land animal?|animals|The cheetah is the fastest land animal over short distances.
What is the largest animal alive?|animals|The blue whale is the largest animal alive.
How many strings does a violin have?|the violin|A violin has four strings: G, D, A and E.
How many keys does a standard piano have?|the piano|A standard piano has 88 keys.
How many players does a football team have on the pitch?|football|A football team has eleven players on the pitch.
In which direction does the sun rise?|the sunrise|The sun rises in the east and sets in the west.
Why is the sky blue?|the sky|Air scatters blue light from the sun more than red light, so the sky looks blue.
Why do we have seasons?|the seasons|Earth's axis is tilted, so each half gets more sunlight for part of the year.
What causes the tides?|the tides|Mainly the pull of the moon's gravity, and to a smaller part the sun's.
How long does Earth take to go round the sun?|the Earth|About 365 and a quarter days, which is why we have leap years.
What is the hardest natural mineral?|minerals|Diamond is the hardest natural mineral.
Which metal is liquid at room temperature?|metals|Mercury is a metal that is liquid at room temperature.
What is the main gas in the air?|the air|Nitrogen, which makes up about 78 percent of the air.
How many bones does an adult human have?|bones|An adult human usually has 206 bones.
What does the heart do?|the heart|The heart pumps blood, which carries oxygen and food to all parts of the body.
Which vitamin does sunlight help the skin to make?|vitamins|Sunlight helps the skin to make vitamin D.
What is the opposite of north on a compass?|compasses|South is the opposite of north.
How many sides does a hexagon have?|hexagons|A hexagon has six sides.
What do the angles of a triangle add up to?|triangles|The angles of a flat triangle add up to 180 degrees.
What is the smallest prime number?|prime numbers|The smallest prime number is 2, the only even one.
What is the freezing point of water in kelvin?|kelvin|Water freezes at about 273 kelvin.
Who was the first person to walk on the moon?|the moon|Neil Armstrong, in July 1969.
In which year did the Second World War end?|history|The Second World War ended in 1945.
In which year did the Berlin Wall fall?|the Berlin Wall|The Berlin Wall fell in November 1989.
Which country gave the Statue of Liberty to the United States?|the statue|It was a gift from the people of France.
Which language is spoken in Brazil?|languages|The official language of Brazil is Portuguese.
What currency is used in Japan?|money|Japan uses the yen.
What is the longest river in South America?|rivers|The Amazon is the longest river in South America.
Which desert covers much of northern Africa?|deserts|The Sahara covers much of northern Africa.
What do caterpillars turn into?|caterpillars|Caterpillars turn into butterflies or moths.
What do you call a baby sheep?|sheep|A baby sheep is called a lamb.
What colour do you get from blue and yellow paint?|paint|Blue and yellow paint mix to green.
Which instrument measures temperature?|instruments|A thermometer measures temperature.
"""

DEFINITIONS = """
thrifty|careful with money and not wasteful
fragile|easily broken or damaged
ancient|very old, from a time long ago
nocturnal|active at night rather than during the day
drought|a long time with little or no rain
budget|a plan of what one will earn and spend
nephew|a son of one's brother or sister
deadline|the time by which something must be done
evaporate|to turn from a liquid into vapour
orchard|a piece of land where fruit trees grow
reluctant|not really willing to do something
transparent|letting light through, so that one can see what is behind
hibernate|to spend the winter in a deep, sleep-like state
synonym|a word that means the same as another word
postpone|to move something to a later time
neutral|not taking either side
pedestrian|a person who goes on foot
souvenir|a thing kept to remember a place or an event
harvest|the gathering of ripe crops
carnivore|an animal that eats mainly meat
volunteer|someone who does work without being paid for it
recipe|a list of ingredients and steps for making a dish
autumn|the season between summer and winter
museum|a place where objects of art, history or science are kept and shown
"""

ADVICE = """
How do I keep bread fresh?|bread|Keep it in a bread box or paper bag, and freeze what you won't eat within three days.
How do I boil an egg so that it is hard?|eggs|Boil it for about ten minutes, then cool it in cold water.
How can I fall asleep more easily?|sleep|Go to bed at the same time each night, and put screens away an hour before.
How do I stop onions from making me cry?|onions|Chill the onion first and use a sharp knife.
How can I save money on groceries?|groceries|Plan your meals, write a list, and buy only what is on it.
How do I remove a fresh wine stain?|stains|Blot it, don't rub, then rinse with cold water before you wash it.
How often should I water a cactus?|cactuses|Only when the soil is fully dry, roughly every two weeks in summer.
How do I make a strong password?|passwords|Join four or more unrelated words, and use it for one account only.
How can I remember people's names?|names|Repeat the name when you hear it, and use it once more as you leave.
How do I prepare for a job interview?|interviews|Read about the firm, practise common answers, and bring two questions.
How do I start running?|running|Alternate one minute of running with two of walking, three times a week.
How can I drink more water?|water|Keep a full glass within reach and drink one with each meal.
How do I keep my desk tidy?|desks|Give each thing a place, and clear the desk for five minutes at the end of the day.
How do I learn new words in a language?|languages|Study ten a day with flashcards, and review them the next day.
What should I pack for a day hike?|hiking|Water, food, a rain jacket, a map, and a charged phone.
How do I cool down a hot room?|hot rooms|Close the blinds by day, and open windows on both sides at night.
How do I sharpen a pencil without a sharpener?|pencils|Shave it with a small knife, always cutting away from you.
How do I get gum out of hair?|gum|Work in some oil, wait a few minutes, and comb the gum out.
How can I make rice less sticky?|rice|Rinse it until the water runs clear before you cook it.
How do I ripen an avocado faster?|avocados|Put it in a paper bag with a banana for a day or two.
How do I back up my photos?|photos|Keep one copy on a drive at home and one in the cloud.
How do I clean a cloudy glass vase?|vases|Fill it with warm water and vinegar, wait an hour, and rinse.
How can I be calmer before a speech?|speeches|Learn the opening by heart, and breathe out slowly before you begin.
How do I fix a squeaky door?|doors|Put a drop of oil on each hinge and move the door a few times.
How do I choose a ripe melon?|melons|Take one that is heavy for its size and smells sweet at the stem end.
How do I stop my glasses from fogging up?|glasses|Wash them with a drop of soap and let them dry in the air.
How can I read more books?|reading|Carry one with you and read ten pages before bed.
How do I make friends in a new town?|friends|Join a club or class that meets weekly, and keep going.
How do I treat a small burn?|burns|Hold it under cool running water for about twenty minutes, then cover it loosely.
How do I keep cut flowers fresh?|flowers|Trim the stems, and change the water every two days.
How do I peel garlic quickly?|garlic|Press the clove with the flat of a knife; the skin comes off.
How do I wash a wool sweater?|wool|By hand in cool water with mild soap, then dry it flat.
How do I avoid back pain at a desk?|back pain|Keep your feet flat and the screen at eye level, and stand up often.
How do I save battery on my phone?|batteries|Lower the brightness and close apps that use your location.
How do I split a bill fairly?|bills|Let each person pay for what they ordered, and share the tip.
How do I thaw frozen chicken safely?|chicken|Thaw it in the fridge overnight, never on the counter.
"""

SUMMARIES = """
The bus was late, so Anna missed her train and had to wait an hour.|A late bus made Anna miss her train.
The shop sold out of umbrellas within an hour because of the heavy rain.|Heavy rain sold out the shop's umbrellas.
Tom studied every evening for a month and passed his driving test.|After a month of study Tom passed his test.
The town planted two hundred trees along the river to stop floods.|The town planted trees to prevent floods.
The museum will be closed in May for repairs and open again in June.|The museum is closed for repairs in May.
Our meeting moved from Tuesday to Friday since the manager is ill.|The manager is ill, so we meet on Friday.
The hikers turned back when fog hid the path to the summit.|Fog made the hikers turn back.
The bakery uses flour from a mill nearby, and people say it tastes better.|The bakery's local flour is popular.
Maria fixed her old bicycle instead of buying one, and saved 300 euros.|Maria's repair of her bicycle saved 300 euros.
The library now lends tools and games as well as books.|The library now lends tools and games too.
A power cut stopped the lifts, so visitors had to take the stairs.|A power cut forced visitors onto the stairs.
The dog barked at the postman each day until he brought it a biscuit.|A biscuit won the dog over to the postman.
Sales rose in spring, fell in summer, and ended the year where they began.|Over the year sales did not change.
The team lost its first three matches and then won all the others.|After three losses the team won every match.
The school moved lunch to noon because pupils were hungry by eleven.|Hungry pupils got an earlier lunch, at noon.
Lena forgot her keys, so her neighbour let her wait in his kitchen.|A neighbour took Lena in when she forgot her keys.
The new bridge cuts the drive to the airport from fifty minutes to twenty.|The new bridge saves half an hour.
Snow closed the mountain road, and the village got its food by helicopter.|Snowed in, the village was supplied by air.
The café stopped using paper cups and gives a discount for bringing your own.|The café rewards guests who bring a cup.
The farmer sold the cows, since milk prices had fallen for three years.|Low milk prices made the farmer sell the cows.
The flight was delayed twice, and in the end the passengers went by coach.|After two delays the passengers took a coach.
The city made the centre free of cars, and the shops there sold more.|The car-free centre helped the shops.
Ben baked the cake too long, but nobody minded because the cream hid it.|Cream hid that Ben's cake was overbaked.
The concert moved indoors when a storm came, and it still sold out.|Despite a storm the concert sold out, indoors.
"""

POLITENESS = """
thank a colleague for help|Thank you for your help today; it saved me a lot of time.
decline an invitation to dinner|Thank you for inviting me. I can't make it this time, but have a lovely evening.
ask a neighbour to turn the music down|Hello! Could you turn the music down a little, please? Thank you.
say that I will be late|I'm sorry, I am running ten minutes late. I'll be there as soon as I can.
ask for a day off|Could I take next Friday off, please? I'll finish my report before then.
congratulate a friend on a new job|Congratulations on the new job! They are lucky to have you.
apologise for a forgotten birthday|I'm so sorry that I missed your birthday. May I take you out to lunch?
ask a stranger for directions|Excuse me, could you tell me the way to the station, please?
remind someone of an unpaid bill|Just a friendly reminder that last month's bill is still open. Thank you!
turn down a job offer|Thank you for the offer. I have decided to go another way, and wish you all the best.
cancel a dentist's appointment|I'm afraid I have to cancel my appointment on Monday. Could we find another day?
welcome a new neighbour|Welcome to the street! Just ring the bell if you need anything.
ask a guest to take off their shoes|Would you mind leaving your shoes by the door? Thank you!
send back a cold soup|Excuse me, my soup is cold. Could you warm it up for me, please?
comfort a friend who failed an exam|I'm sorry about the exam. You worked hard, and there will be another chance.
ask for a seat on the train|Excuse me, is this seat taken?
disagree in a meeting|I see your point. I would like to suggest another way.
ask someone to repeat a sentence|Sorry, I didn't catch that. Could you say it again, please?
end a long phone call|It was lovely to talk to you. I have to go now, but let's speak again soon.
ask a teacher for more time|Could I please have two more days for the essay? I have been ill this week.
thank a host for dinner|Thank you for a wonderful evening. The food was delicious.
refuse a second helping|It was delicious, thank you, but I couldn't eat another bite.
ask to borrow a ladder|Could I borrow your ladder on Saturday, please? I'll bring it back by evening.
correct a wrong order in a café|Excuse me, I think I ordered tea. Could you change it, please?
"""


def questions() -> Iterator[tuple[str, str, str, str]]:
    """Yields (topic, question, subject, preferred answer), each question once."""
    ask = ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.")
    say = ("{1} is the capital of {0}.", "The capital of {0} is {1}.", "It is {1}.")
    for i, entry in enumerate(CAPITALS.replace("\n", "|").strip("|").split("|")):
        country, city = (name.replace("_", " ") for name in entry.split())
        yield "capitals", ask[i % 3].format(country), country, say[i // 3 % 3].format(country, city)

    for i in range(48):
        a, b = 13 + 7 * i % 61, 2 + 5 * i % 11
        sum_, value = ((f"{a} + {b}", a + b), (f"{a} - {b}", a - b), (f"{a} × {b}", a * b), (f"{a * b} ÷ {b}", a))[
            i % 4
        ]
        question = ("What is {}?", "How much is {}?", "Please work out {}.")[i % 3].format(sum_)
        yield "arithmetic", question, sum_, (f"{sum_} = {value}.", f"It is {value}.")[i // 2 % 2]

    for i in range(36):
        big, small, factor = UNITS[i % 12]
        n = 2 + i // 12 + i % 5
        question = (f"How many {small} are there in {n} {big}?", f"Convert {n} {big} to {small}.")[i // 12 % 2]
        short = f"{n} {big} are {n * factor} {small}."
        yield "units", question, big, (short, f"{short[:-1]}, since one of them is {factor} {small}.")[i % 3 == 0]

    for question, subject, answer in _table(FACTS):
        yield "facts", question, subject, answer
    for word, meaning in _table(DEFINITIONS):
        yield (
            "definitions",
            f"What does '{word}' mean?",
            f"the word '{word}'",
            f"'{word.capitalize()}' means {meaning}.",
        )
        yield "definitions", f"Define '{word}' in one sentence.", f"the word '{word}'", f"It means {meaning}."
    for question, subject, answer in _table(ADVICE):
        yield "advice", question, subject, answer
    for text, summary in _table(SUMMARIES):
        yield "summaries", f"Summarise in one short sentence: {text}", "this text", summary
        yield "summaries", f"{text} What is the main point?", "the main point", f"The main point: {summary}"
    for task, answer in _table(POLITENESS):
        yield "politeness", f"Write a polite message to {task}.", "such messages", answer
        yield "politeness", f"What can I say to {task}?", "such things", f'You could say: "{answer}"'


def pairs() -> list[dict]:
    """The rows of the file in a mixed order: messages, their topic, and whether the label is wrong."""
    rows: list[dict] = []
    for i, (topic, question, subject, answer) in enumerate(questions()):
        styles = (EVASIVE, RUDE, RAMBLING, EVASIVE, PADDED, RUDE)
        style = styles[i % len(styles)]
        rejected = style[i // len(styles) % len(style)].format(it=subject, answer=answer)
        # Annotators err. Every seventh pair is labelled the wrong way round, and says so.
        swapped = i % 7 == 3
        chosen, rejected = (rejected, answer) if swapped else (answer, rejected)
        sides = (("prompt", "user", question), ("chosen", "assistant", chosen), ("rejected", "assistant", rejected))
        row: dict = {name: [{"role": role, "content": text}] for name, role, text in sides}
        rows.append(row | {"topic": topic, "mislabelled": swapped})
    # random() is the one method whose sequence Python promises for all versions.
    generator = random.Random(0)
    return sorted(rows, key=lambda _: generator.random())


def write(path: Path = PATH) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in pairs())
    path.write_bytes("".join(lines).encode())


def _table(text: str) -> Iterator[list[str]]:
    return (line.split("|") for line in text.strip().splitlines())


if __name__ == "__main__":
    write()
